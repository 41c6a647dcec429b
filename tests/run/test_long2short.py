"""`kimi long2short` as a whole, on a run of seconds, and what stops it."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import TINY, make_folder
from transformers import AutoModelForCausalLM

from kimi_core import cli
from kimi_core.metrics import read_metrics

REWARD = "def reward(prompt, response):\n    return float(len(response) % 2)\n"
SETTINGS = """
[long2short]
prompts = 6
samples = 4

[long2short.sft]
steps = 2
batch_size = 4

[long2short.dpo]
steps = 2
batch_size = 4

[long2short.rl]
iterations = 2
"""
OUT = Path("runs/tiny/long2short")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY + SETTINGS)
    (folder / "r.py").write_text(REWARD)
    prompts = [{"prompt": f"{n}*3=", "answer": str(3 * n)} for n in range(1, 12)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "model")
        sources = ["model.name=model", "prompts.source=p.jsonl", "reward.function=r.py:reward"]
        assert cli.main(["train", "tiny.toml", "name=tiny", *sources]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def long2short(*arguments):
    return cli.main(["long2short", "runs/tiny", *map(str, arguments)])


def points():
    return json.loads((OUT / "summary.json").read_text())["points"]


def test_one_command_gives_every_point_and_does_not_repeat_itself(folder, capsys):
    assert long2short("--methods", "merge", "shortest", "dpo") == 0
    assert long2short() == 0
    found = {one["method"]: one for one in points()}
    assert list(found) == ["long", "merge", "shortest", "dpo", "rl"]
    assert [one["samples"] for one in found.values()] == [0, 0, 24, 24, 24 + 2 * 2 * 2]
    assert found["long"]["cpu_s"] == 0 and all(found[m]["cpu_s"] > 0 for m in ("dpo", "rl"))
    assert all(one["n"] == 4 and 1 <= one["tokens"] <= 8 for one in found.values())
    assert (OUT / "figure7.png").read_bytes().startswith(b"\x89PNG")
    assert "| shortest | 1 |" in capsys.readouterr().out
    for model in ("start/checkpoint", "seed-0/merge", "seed-0/shortest", "seed-0/rl/checkpoint"):
        AutoModelForCausalLM.from_pretrained(OUT / model)

    before = (OUT / "summary.json").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in OUT.rglob("model.safetensors")}
    assert long2short() == 0
    assert (OUT / "summary.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in OUT.rglob("model.safetensors")} == kept

    # As after a crash: sampling and RL go on, and nothing of them is done a second time.
    record = json.loads(before)
    record["points"] = [one for one in record["points"] if one["method"] == "long"]
    (OUT / "summary.json").write_text(json.dumps(record))
    answers = (OUT / "seed-0" / "answers.jsonl").read_bytes()
    assert long2short("--methods", "dpo", "rl") == 0
    again = {one["method"]: one for one in points()}
    assert again["rl"] == found["rl"]
    assert again["dpo"]["accuracy_sampled"] == found["dpo"]["accuracy_sampled"]
    assert (OUT / "seed-0" / "answers.jsonl").read_bytes() == answers
    iterations, _ = read_metrics(OUT / "seed-0" / "rl" / "metrics.jsonl")
    assert [one.iteration for one in iterations] == [1, 2]


@pytest.mark.slow
@pytest.mark.nightly
def test_dpo_on_two_ranks(folder):
    assert long2short("--methods", "dpo") == 0
    assert long2short("trainer.ranks=2", "--methods", "dpo", "--out", "two") == 0
    models = [Path(out) / "seed-0" / "dpo" for out in (OUT, "two")]
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in models)
    start = AutoModelForCausalLM.from_pretrained("runs/tiny/checkpoint").state_dict()
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in start)
    assert any((one[name] - start[name]).abs().max() > 1e-5 for name in start)


def test_other_settings_need_another_folder(folder, capsys):
    assert long2short("--methods", "shortest", "--seeds", 1) == 0
    assert [(one["method"], one["seed"]) for one in points()] == [("long", 1), ("shortest", 1)]
    assert (OUT / "seed-1" / "answers.jsonl").exists()
    before = (OUT / "summary.json").read_bytes()
    assert long2short("long2short.samples=3", "--methods", "dpo") == 2
    said = capsys.readouterr().err
    assert "long2short.samples was 4 and is 3" in said and "--out" in said
    assert (OUT / "summary.json").read_bytes() == before
    for damaged in (before[:-9], b'{"points": [{"method": "dpo"}]}', b"[]"):
        (OUT / "summary.json").write_bytes(damaged)
        assert long2short("--methods", "shortest", "--seeds", 1) == 2
        said = capsys.readouterr().err
        assert "summary.json is damaged" in said and "remove summary.json" in said
        assert (OUT / "summary.json").read_bytes() == damaged
    (OUT / "summary.json").write_bytes(before)


def test_models_of_unlike_shapes_keep_what_there_is(folder, capsys):
    wide = make_folder(folder / "wide", width=32)
    assert long2short("--methods", "merge", "--short", wide) == 2
    said = capsys.readouterr().err
    assert "long2short by merge" in said and "hidden_size is 16 and 32" in said
    assert [one["method"] for one in points()] == ["long"]
    assert long2short("--methods", "shortest", "--short", wide) == 0
    assert [one["method"] for one in points()] == ["long", "shortest"]


def test_given_models_and_weights(folder):
    for seed, name in enumerate("ab"):
        make_folder(folder / name, seed=seed)
    assert long2short("--methods", "merge", "--short", "a", "b", "--weights", 2, 1, 1) == 0
    assert not (OUT / "start").exists()
    models = ["runs/tiny/checkpoint", "a", "b", OUT / "seed-0" / "merge"]
    *parts, merged = [AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in models]
    expected = 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2]
    assert (merged - expected).abs().max() < 1e-6


def test_no_right_answer_at_all(folder, capsys):
    (folder / "r.py").write_text("def reward(prompt, response):\n    return 0.0\n")
    assert long2short("--methods", "shortest", "dpo") == 2
    said = capsys.readouterr().err
    assert "None of the 24 answers to 6 training prompts is right" in said
    assert "are kept" in said and [one["method"] for one in points()] == ["long"]


def test_answers_of_one_length_give_no_pair(folder, capsys):
    (folder / "r.py").write_text("def reward(prompt, response):\n    return 1.0\n")
    settings = "rollout.max_response_tokens=1"
    assert long2short(settings, "--methods", "dpo") == 2
    assert "the sampled answers give no pair" in capsys.readouterr().err


def test_a_run_that_has_not_ended(folder, capsys):
    shutil.rmtree("runs/tiny/checkpoint")
    assert long2short() == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert not OUT.exists()
    assert cli.main(["long2short", "runs/none"]) == 2
    assert "runs/none is not the folder of a run" in capsys.readouterr().err
