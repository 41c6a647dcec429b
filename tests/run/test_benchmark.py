"""`kimi evaluate --benchmark`, whole, with a tiny model."""

import json
import tomllib
from pathlib import Path

import pytest

from kimi_core import cli
from kimi_core.config import Config, ModelConfig
from kimi_core.evaluation.record import Answer
from kimi_core.models.scratch import scratch_model
from kimi_core.run.benchmark import figures
from kimi_core.types import Prompt


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alphabet = "".join(chr(code) for code in range(32, 127)) + "\n"
    settings = ModelConfig(scratch={"layers": 1, "width": 16, "heads": 2, "context": 512})
    model, tokenizer = scratch_model(settings, alphabet, seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]
    Path("test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("mmlu.csv").write_text("2 + 2?,3,4,5,6,B\n1 + 1?,2,3,4,5,A\n")
    return tmp_path


def evaluated(capsys, *arguments) -> dict:
    settings = ["model.name=model", "model.device=cpu", "prompts.chat=false", "reward.workers=1"]
    command = ["evaluate", *arguments, *settings, "rollout.max_response_tokens=6"]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_results_are_written_and_repeat(folder, capsys):
    arguments = ["--benchmark", "gsm8k", "--data", "test.jsonl", "--samples", "3"]
    first = evaluated(capsys, *arguments)
    assert (first["problems"], first["samples"], first["temperature"]) == (5, 3, 0.7)
    assert set(first["pass@k"]) == {"1", "2", "3"}
    assert first["pass@k"]["1"]["mean"] == pytest.approx(first["avg@3"]["mean"])
    written = json.loads(Path("runs/benchmark/gsm8k/results.json").read_text())
    config = Config(**tomllib.loads(written.pop("config")))
    assert written == first and config.model.name == "model"
    record = Path("runs/benchmark/gsm8k/answers.jsonl")
    lines = record.read_text().splitlines()
    assert len(lines) == 6
    record.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    assert evaluated(capsys, *arguments) == first
    record.unlink()
    assert evaluated(capsys, *arguments) == first


def test_multiple_choice_greedy_and_limited(folder, capsys):
    found = evaluated(capsys, "--benchmark", "mmlu", "--data", "mmlu.csv", "--limit", "1")
    assert (found["problems"], found["temperature"]) == (1, 0.0)
    assert found["avg@1"]["interval"] == "Wilson" and "maj@1" not in found


def test_bad_input(folder, capsys):
    assert cli.main(["evaluate", "--benchmark", "gsm8k", "--samples", "0"]) == 2
    assert "allowed are 1 or more" in capsys.readouterr().err
    assert cli.main(["evaluate", "--benchmark", "gsm8k"]) == 2
    assert "needs --data" in capsys.readouterr().err
    arguments = ["--benchmark", "mmlu", "--data", "test.jsonl"]
    assert cli.main(["evaluate", *arguments, "model.name=model"]) == 2
    assert "test.jsonl, line 1 is not in the format of mmlu" in capsys.readouterr().err
    arguments = ["--benchmark", "gsm8k", "--data", "test.jsonl", "model.name=model"]
    assert cli.main(["evaluate", *arguments, "prompts.chat=false"]) == 2
    assert "does not fit into the model's context" in capsys.readouterr().err


def answer(text: str, reward: float | None, end: str = "stop") -> Answer:
    return Answer(text, len(text), end, reward)


def test_figures():
    judged = [
        (
            Prompt(0, "", "4", tags={"subject": "a"}),
            [answer("\\boxed{4}", 1.0)] * 2 + [answer("\\boxed{5}", 0.0), answer("none", None)],
        ),
        (
            Prompt(1, "", "0.5", tags={"subject": "b"}),
            [
                answer("\\boxed{1/2}", 1.0),
                answer("\\boxed{0.5}", 1.0),
                answer("\\boxed{3}", 0.0),
                answer("\\boxed{3}", 0.0, "length"),
            ],
        ),
        (Prompt(2, "", "9", tags={"subject": "b"}), [answer("", None)] * 4),
    ]
    found = figures(judged, "math", 4, seed=0)
    assert (found["problems"], found["unscored"]) == (3, 5)
    assert found["avg@4"]["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["pass@k"]["2"]["mean"] == pytest.approx((1 + 5 / 6) / 2)
    assert found["pass@k"]["4"]["mean"] == 1  # One problem has 4 verdicts.
    assert found["maj@4"]["mean"] == 1  # 1/2 and 0.5 are one answer, and came first.
    assert found["by_subject"]["b"] == {"problems": 1, "accuracy": 0.5}
    assert found["cut"] == 1 / 12
