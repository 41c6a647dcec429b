"""What a user gets wrong ends with status 2 and what to do about it, never with a traceback."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import TINY, make_folder

import kimi_core
from kimi_core.cli import settings
from kimi_core.reward.base import RewardError
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.dry_run import describe
from kimi_core.run.run import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run train.py's work in this process; returns its status and its one complaint."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)

    def call(*overrides: str, **options: bool) -> tuple[int, str]:
        given = ["tiny.toml", *overrides]
        quiet = Console(file=StringIO())
        status = settings.with_config(given, lambda config: train(config, console=quiet, **options))
        _, error, complaint = capsys.readouterr().err.partition("error: ")  # after progress bars
        return status, error + complaint

    return call


def assert_refused(outcome: tuple[int, str], *parts: str) -> None:
    status, complaint = outcome
    assert status == 2, complaint
    assert complaint.startswith("error: ")
    assert "Traceback" not in complaint
    for part in parts:
        assert part in complaint


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.budget=7", ["Unknown key rollout.budget = 7", "token_budget"]),
        ("speed=9", ["Unknown key speed = 9", "did you mean seed=9"]),
        ("rollout.samples_per_prompt=1", ["rollout.samples_per_prompt = 1", "2"]),
        ("reward.length_weight=2", ["reward.length_weight = 2", "below 2"]),
        ("reward.length_weight=2.5", ["reward.length_weight = 2.5", "below 2"]),
        ("trainer.tau=0", ["trainer.tau = 0", "greater than 0"]),
        ("trainer.tau=-0.1", ["trainer.tau = -0.1", "greater than 0"]),
        ("trainer.tau=nan", ["trainer.tau = nan", "greater than 0"]),
        ("name=../elsewhere", ["name = '../elsewhere'"]),
        ("model.scratch.heads=3", ["model.scratch.width = 16 is not a multiple"]),
        ("rollout.stop=['#','']", ["rollout.stop = ['#', '']", "at least one character"]),
        ("rollout.max_response_tokens=30", ["the model's context is 32", "lower the limit"]),
        ("prompts.source=riddles", ["prompts.source = 'riddles'", "multiply, addition"]),
        ("prompts.held_out=7200", ["Cannot hold out 7200 of 7200 prompts"]),
        ("sft.data=poems", ["sft.data = 'poems'", "multiply_lengths"]),
        ("reward.function=taste", ["reward.function = 'taste'", "match"]),
        ("reward.function=nowhere.py:f", ["No file", "nowhere.py"]),
        ("trainer.trainable_layers=2", ["trainer.trainable_layers = 2", "1 layers"]),
        ("other.toml", ["One config at a time, not 2: tiny.toml, other.toml"]),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_bound(run, override, parts):
    assert_refused(run(override), *parts)
    assert not Path("runs/think/states").exists() or not any(Path("runs/think/states").iterdir())


def test_a_stop_string_outside_of_the_alphabet_never_occurs(run):
    assert run("rollout.stop=['$','##','漢字']", "iterations=1", "sft.steps=1") == (0, "")


def test_no_config_and_no_toml(run):
    def load(name: str) -> tuple[int, str]:
        return settings.with_config([name], lambda config: None)

    Path("broken.toml").write_text("iterations = = 3")
    assert load("nowhere.toml") == load("broken.toml") == 2


def test_a_prompt_longer_than_the_context_is_named(run, tmp_path):
    Path("p.jsonl").write_text(
        '{"prompt": "2*3=", "answer": "6"}\n'
        f'{{"prompt": "{"1+" * 20}1=", "answer": "21"}}\n'
        '{"prompt": "2*4=", "answer": "8"}\n'
    )
    folder = make_folder(tmp_path / "model")
    outcome = run(f"model.name={folder}", "prompts.source=p.jsonl", "prompts.held_out=1")
    assert_refused(outcome, "Prompt 1 has 42 tokens", "that is 50, and the model's context is 32")


def test_a_model_folder_without_weights(run, tmp_path):
    folder = make_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert_refused(run(f"model.name={folder}"), str(folder), "expected", "*.safetensors")
    assert_refused(run(f"model.name={tmp_path / 'nothing'}"), "No model folder")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["p.jsonl is empty", "prompt and answer"]),
        ("\n \n", ["p.jsonl is empty"]),
        ('{"prompt": "2*3=", "answer": "6"}\n{"prompt": "2*4=", ans', ["p.jsonl, line 2", "ans"]),
        ('{"prompt": "2*3=", "answer": "6"}\n\n{"prompt": "2*4="}', ['line 3: no "answer"']),
        ('{"prompt": "2*3=", "answer": true}', ['line 1: "answer" is true', "non-empty string"]),
        ("[1, 2]", ["line 1: found '[1, 2]'"]),
    ],
)
def test_a_prompt_file_that_is_empty_or_malformed_names_the_line(run, tmp_path, text, parts):
    Path("p.jsonl").write_text(text)
    folder = make_folder(tmp_path / "model")
    assert_refused(run(f"model.name={folder}", "prompts.source=p.jsonl"), *parts)


def test_no_prompt_file(run, tmp_path):
    folder = make_folder(tmp_path / "model")
    assert_refused(run(f"model.name={folder}", "prompts.source=p.jsonl"), "No file p.jsonl")


# The verdicts of the first CALLS calls are sound; 4 are those of the evaluation at the start.
REWARD = """
calls = 0

def judge(prompt, text):
    global calls
    calls += 1
    return 1.0 if calls <= CALLS else WRONG
"""


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("1 / 0", "raised ZeroDivisionError on prompt"),
        ("float('nan')", "returned nan for prompt"),
    ],
)
def test_a_reward_function_that_fails_stops_the_run_and_loses_nothing(run, wrong, complaint):
    reward = REWARD.replace("WRONG", wrong)
    Path("reward.py").write_text(reward.replace("CALLS", "9"))  # 4 + 4 + 1: in iteration 2
    overrides = ["reward.function=reward.py:judge", "prompts.held_out=2", "evaluation.prompts=2"]
    assert_refused(run(*overrides), "Reward function judge", complaint)
    folder = Path("runs/think")
    assert (folder / "states" / "000001" / "state.json").is_file()
    assert not (folder / "checkpoint").exists()

    Path("reward.py").write_text(reward.replace("CALLS", "1000"))  # mended: the run goes on
    assert_refused(run(*overrides, resume=True), "reward.py", "--accept-changes")
    status, complaint = run(*overrides, resume=True, accept_changes=True)
    assert status == 0, complaint
    assert (folder / "states" / "000002" / "state.json").is_file()


def test_tokens_stay_in_the_buffer_when_the_reward_fails(run):
    Path("reward.py").write_text(REWARD.replace("WRONG", "1 / 0").replace("CALLS", "1"))
    loop = build(load_config("tiny.toml", ["reward.function=reward.py:judge"])).loop
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        loop.iterate()
    stats = loop.buffer.stats()
    assert stats.trajectories == 4
    assert stats.tokens_by_version.keys() == {0}
    assert stats.tokens_by_version[0] >= 4
    assert loop.iteration == loop.samples_trained == 0


def test_resume_refuses_another_config_and_another_model(run, tmp_path):
    folder = make_folder(tmp_path / "model")
    overrides = [f"model.name={folder}", "trainer.trainable_layers=1", "iterations=1"]
    assert run(*overrides)[0] == 0
    assert_refused(
        run(*overrides, "trainer.tau=0.5", "seed=3", resume=True),
        "trainer.tau: saved 0.01, given 0.5",
        "seed: saved 0, given 3",
    )
    # The same folder with other weights in it: the same class, sizes and settings.
    make_folder(folder, seed=1)
    assert_refused(run(*overrides, "iterations=2", resume=True), "resume with the same model")
    make_folder(folder, width=32)
    assert_refused(run(*overrides, "iterations=2", resume=True), "resume with the same model")
    make_folder(folder)
    assert run(*overrides, "iterations=2", resume=True) == (0, "")


def test_resume_without_a_run_starts_it(run):
    assert run("iterations=1", resume=True) == (0, "")
    assert Path("runs/think/states/000001/state.json").is_file()


def test_a_second_run_in_the_same_folder(run):
    assert run("iterations=1") == (0, "")
    before = (Path("runs/think/metrics.jsonl")).read_bytes()
    assert_refused(run("iterations=1"), "continue it with --resume", "another name=...")
    assert Path("runs/think/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("a bug of ours")])
def test_what_is_not_the_users_fault_has_another_status(run, capsys, error):
    def broken(config):
        raise error

    given = ["tiny.toml"]
    if isinstance(error, OSError):
        assert settings.with_config(given, broken) == 1
        assert capsys.readouterr().err == "error: the disk is full\n"
    else:
        with pytest.raises(RuntimeError):
            settings.with_config(given, broken)


def test_the_driver_itself(tmp_path):
    """One subprocess for the wiring: status, standard error, and no torch for a misspelt key."""
    environment = os.environ | {"PYTHONPATH": str(Path(kimi_core.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "python" / "train.py"), "--dry-run", "trainer.tua=1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: Unknown key trainer.tua = 1; did you mean trainer.tau=1?")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_complains_as_a_run_does(run, capsys):
    given = ["tiny.toml", "prompts.source=riddles"]
    assert settings.with_config(given, lambda config: print(describe(config))) == 2
    assert "prompts.source = 'riddles'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_with_its_state_intact(run, monkeypatch):
    original = torch.nn.utils.clip_grad_norm_
    calls = []

    def explode(*args):
        calls.append(1)
        return torch.tensor(float("nan")) if len(calls) > 2 else original(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)
    status, complaint = run()
    assert status == 1
    assert "the update was not taken" in complaint
    assert Path("runs/think/states/000001/state.json").is_file()
