"""``kimi train --resume --from N``: the run goes on from a kept state, and nothing is lost."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import TINY

from kimi_core import cli
from kimi_core.metrics import read_lines, read_metrics
from kimi_core.run import go_back as module
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train

FOLDER = Path("runs/think")
BUDGET = ("rollout.token_budget=5", "sft.steps=1", "keep_states=9")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A folder in which a run has ended: five states, and trajectories that go on."""
    work = tmp_path_factory.mktemp("work")
    (work / "tiny.toml").write_text(TINY)
    train(config(work, f"runs={work / 'runs'}"), console=Console(file=StringIO()))
    return work


@pytest.fixture
def given(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config(work: Path, *settings: str):
    return load_config(work / "tiny.toml", [*BUDGET, "iterations=4", *settings])


def run(*settings: str, **options) -> str:
    said = StringIO()
    given = config(Path(), "runs=runs", *settings)
    train(given, console=Console(file=said, width=500), resume=True, **options)
    return said.getvalue()


def weights() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "checkpoint" / "model.safetensors")


def numbers() -> list[int]:
    return [one.iteration for one in read_metrics(FOLDER / "metrics.jsonl")[0]]


def kinds(path: Path) -> list[tuple[str, int]]:
    return [(one["kind"], one["iteration"]) for _, one in read_lines(path)]


def test_the_same_settings_give_the_same_bits_and_what_came_after_is_kept(given):
    before, lines = weights(), kinds(FOLDER / "metrics.jsonl")
    later = {
        name: (FOLDER / name).read_bytes()
        for name in ("trajectories/000003.jsonl", "trajectories/000004.jsonl", "samples/000004.txt")
    }
    said = run(back_to=2)
    assert "back to the state of 2; what came after it is in runs/think/aside/1" in said
    assert numbers() == [1, 2, 3, 4]
    assert all(torch.equal(before[name], one) for name, one in weights().items())
    aside = FOLDER / "aside" / "1"
    assert kinds(aside / "metrics.jsonl") == [one for one in lines if one[1] > 2]
    assert {name: (aside / name).read_bytes() for name in later} == later
    assert sorted(path.name for path in (aside / "states").iterdir()) == ["000003", "000004"]
    resumed = [one for _, one in read_lines(FOLDER / "metrics.jsonl") if one["kind"] == "resume"]
    assert (resumed[0]["iteration"], resumed[0]["back_from"]) == (2, 4) and resumed[0]["lost_s"] > 0


@pytest.mark.nightly
def test_a_lower_rate_holds_from_there_on_and_the_same_command_gets_on(given):
    before = weights()
    lower = "trainer.learning_rate=1e-5"
    run(lower, back_to=2)
    after = weights()
    assert not all(torch.equal(before[name], one) for name, one in after.items())
    said = run(lower, back_to=2)  # As a job that is restarted does.
    assert "has gone back to 2 with these settings before" in said
    assert not (FOLDER / "aside" / "2").exists()
    run(lower, "iterations=5", back_to=2)
    assert numbers() == [1, 2, 3, 4, 5]
    # As if the rate had been lowered when the run stood at 2.
    shutil.rmtree(FOLDER)
    train(config(Path(), "runs=runs", "iterations=2"), console=Console(file=StringIO()))
    run(lower)
    assert all(torch.equal(after[name], one) for name, one in weights().items())
    run("trainer.learning_rate=1e-6", back_to=2)
    assert (FOLDER / "aside" / "1").is_dir()


def test_a_process_that_dies_on_the_way_back_loses_nothing(given, monkeypatch):
    before = weights()
    plain, calls = Path.rename, []

    def dies(path, target):
        calls.extend([path.name] if "aside" in Path(target).parts else [])
        if len(calls) in (2, 4, 6, 8):
            calls.append("died")
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.Path, "rename", dies)
        for _ in range(9):
            try:
                run(back_to=1)
                break
            except KeyboardInterrupt:
                kept = sorted(path.name for path in FOLDER.rglob("trajectories/00000[234].jsonl"))
                assert kept == ["000002.jsonl", "000003.jsonl", "000004.jsonl"]
    assert calls.count("died") > 2
    run()
    assert numbers() == [1, 2, 3, 4]
    assert all(torch.equal(before[name], one) for name, one in weights().items())
    aside = FOLDER / "aside"
    states = sorted(path.name for path in aside.glob("*/states/*"))
    assert states == ["000002", "000003", "000004"]
    kept = [kind for path in aside.glob("*/metrics.jsonl") for kind in kinds(path)]
    assert {("iteration", 2), ("iteration", 3), ("iteration", 4)} <= set(kept)


def test_a_state_that_is_not_there_is_named_with_those_that_are(given):
    with pytest.raises(ValueError, match=r"no state of iteration 7.*it has 0, 1, 2, 3, 4"):
        run(back_to=7)
    (FOLDER / "states" / "000002" / "buffer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000002/buffer\.bin is damaged"):
        run(back_to=2)
    assert not (FOLDER / "aside").exists()


def test_an_evaluation_of_the_other_branch_is_not_continued(given):
    """Iteration 4 had other weights when its evaluation was cut off."""
    (FOLDER / "evaluation.jsonl").write_text("left over\n")
    run("trainer.learning_rate=1e-5", back_to=3)
    assert not (FOLDER / "evaluation.jsonl").exists()


def test_the_command_wants_resume(given, capsys):
    assert cli.main(["train", "tiny.toml", "--from", "2"]) == 2
    assert "--from goes back within a run: give --resume, too" in capsys.readouterr().err
    assert json.loads((FOLDER / "summary.json").read_text())["iterations"] == 4
