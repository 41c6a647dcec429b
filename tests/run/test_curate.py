"""`kimi curate`, whole: reasons, files, thresholds that change, and kill -9 at any time."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import in_child
from rich.console import Console
from tiny_runs import TINY, make_folder

from kimi_core import cli
from kimi_core.config import CurateConfig
from kimi_core.prompts.jsonl import read_prompts
from kimi_core.run.config_file import load_config
from kimi_core.run.curate import curate

REWARD = """
import os


def reward(prompt, response):
    kind = prompt.tags["kind"]
    handle = os.open("calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{prompt.text} {len(response)}\\n".encode())
    os.close(handle)
    if prompt.text.endswith("#"):
        return kind == "hack"
    return kind == "trivial" or kind in ("middle", "hack") and len(response) % 2
"""

TEXTS = {
    "trivial": ["1*100=", "1*200="],
    "hopeless": ["9*999=", "9*998="],
    "hack": ["2*100="],
    "middle": ["7*384=", "7*385=", "6*111=", "5*123=", "4*321="],
    "duplicate": ["7*384="],
    "tested": ["3*333="],
    "long": ["3*4" + "1" * 30 + "="],
}

SETTINGS = [
    "name=c",
    "model.name=model",
    "prompts.source=p.jsonl",
    "reward.function=r.py:reward",
    'curate.guess_prompt="{prompt}#"',
    "curate.guess_tokens=3",
    "curate.evaluation_sets=['gsm8k:e.jsonl']",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "r.py").write_text(REWARD)
    make_folder(tmp_path / "model")
    lines = [
        {"prompt": text, "answer": "1", "kind": kind}
        for kind, some in TEXTS.items()
        for text in some
    ]
    lines += [{"prompt": "Is 7 > 3?", "answer": "yes", "kind": "form"}]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("e.jsonl").write_text(json.dumps({"question": "3*333=", "answer": "#### 999"}) + "\n")
    return tmp_path


def made(*overrides) -> Path:
    return curate(load_config("tiny.toml", [*SETTINGS, *overrides]), console=Console(quiet=True))


def reasons(path: Path) -> dict[str, str]:
    lines = map(json.loads, (path / "dropped.jsonl").read_text().splitlines())
    return {line["kind"]: line["reason"] for line in lines}


WANTED = {
    "trivial": "trivial",
    "hopeless": "hopeless",
    "hack": "easy to hack",
    "duplicate": "near-duplicate",
    "tested": "in an evaluation set",
    "long": "too long",
    "form": "true/false",
}


def test_each_reason_and_what_is_written(folder):
    path = made()
    assert reasons(path) == WANTED
    kept = read_prompts(path / "curated.jsonl")
    assert [one.text for one in kept] == TEXTS["middle"]
    answers = [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]
    right = {}
    for line in answers:
        if line["draw"] == "solve" and "prompt" in line:
            assert len(line["answers"]) == 10
            right[sum(len(one["text"]) % 2 for one in line["answers"])] = line
    assert {10 - round(10 * one.difficulty) for one in kept} <= set(right)
    assert {one.tags["discipline"] for one in kept} == {"arithmetic"}
    page = (path / "report.md").read_text()
    assert "5 of 14 prompts are kept" in page and "## Dropped: easy to hack (1)" in page
    assert "| mathematics | arithmetic | 13 | 5 |" in page


def test_other_thresholds_ask_nothing_again(folder):
    made()
    calls = Path("calls").read_text()
    path = made("curate.lowest_difficulty=0", "curate.highest_difficulty=1")
    assert {"trivial", "hopeless"}.isdisjoint(reasons(path))
    path = made("curate.most_per_discipline=2")
    kept = read_prompts(path / "curated.jsonl")
    assert len(kept) == 2 and reasons(path)["middle"] == "surplus"
    assert Path("calls").read_text() == calls
    with pytest.raises(
        ValueError, match=r"temperature = 1\.2, and asked for is temperature = 1\.0"
    ):
        made("curate.temperature=1.0")


def test_nothing_left_is_explained(folder, capsys):
    Path("r.py").write_text("def reward(prompt, response):\n    return 0\n")
    arguments = ["curate", "tiny.toml", "p.jsonl", *SETTINGS]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert "No prompt is left: 0 of 14 prompts are kept" in said
    assert "No answer of the model is right" in said and "report.md" in said
    assert Path("runs/c/report.md").exists() and Path("runs/c/answers.jsonl").exists()


def test_a_set_of_questions_without_free_answers_needs_no_model(folder):
    Path("p.jsonl").write_text('{"prompt": "Prove that 1 = 1.", "answer": "trivial"}\n')
    with pytest.raises(ValueError, match="dropped: 1 proof"):
        made("model.name=nowhere")


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="'Guess!' lacks"):
        CurateConfig(guess_prompt="Guess!")
    with pytest.raises(ValueError, match="nothing lies between"):
        CurateConfig(lowest_difficulty=0.9, highest_difficulty=0.1)


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.nightly)]
)
def test_kill_at_any_time_loses_and_doubles_nothing(folder, kills):
    whole = made("name=whole")
    once = sorted(Path("calls").read_text().split("\n"))
    Path("calls").unlink()
    record, rng, kept = Path("runs/c/answers.jsonl"), random.Random(kills), b""
    for _ in range(kills):
        lines = kept.count(b"\n")
        child = in_child(made)
        # Killed as soon as it has written something new, or a little later, or before.
        until = time.monotonic() + rng.uniform(0.2, 60 if rng.random() < 0.7 else 3)
        while time.monotonic() < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                child = 0
                break
            if record.exists() and record.read_bytes().count(b"\n") > lines:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.002)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = record.read_bytes() if record.exists() else b""
        assert found.startswith(kept)
        kept = found[: found.rfind(b"\n") + 1]
    path = made()
    assert record.read_bytes().startswith(kept)
    for name in ("curated.jsonl", "dropped.jsonl"):
        assert (path / name).read_text() == (whole / name).read_text()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    keys = [(line["draw"], line.get("prompt")) for line in lines]
    assert len(keys) == len(set(keys))
    wanted = (whole / "answers.jsonl").read_text().splitlines()
    assert sorted(record.read_text().splitlines()) == sorted(wanted)
    # A kill between a verdict and its line costs the verdicts of one prompt, and no more.
    calls = Path("calls").read_text().split("\n")
    assert len(once) <= len(calls) <= len(once) + 10 * kills
