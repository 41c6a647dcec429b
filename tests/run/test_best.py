"""The best checkpoint of a run and its early end: as evaluations say, also after any kill."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import TINY

from kimi_core.config import EvaluationConfig
from kimi_core.metrics import EvaluationMetrics, read_metrics
from kimi_core.models.load import load_pretrained
from kimi_core.run import best, run
from kimi_core.run.best import is_stuck, read_best
from kimi_core.run.config_file import load_config
from kimi_core.run.folder import RunFolder
from kimi_core.run.report import Report
from kimi_core.run.states import States

SETTINGS = [
    "iterations=6",
    "keep_states=99",
    "save_every=4",
    "evaluation.every=1",
    "evaluation.prompts=none",
    "evaluation.best=held_out/sampled",
    "prompts.held_out=12",
    "reward.function=reward.py:some",
    "trainer.learning_rate=3e-2",
]
REWARD = """
def some(prompt, response):
    return sum(character in "1234" for character in response) / 8
"""
EVALUATED = EvaluationMetrics(
    iteration=0, policy_version=0, accuracy_greedy=0.6, accuracy_sampled=0.5, length_mean=5.0,
    n=100, seed=1,
)  # fmt: skip


def carry_out(*overrides: str, **options) -> tuple[Path, str]:
    said = StringIO()
    config = load_config("tiny.toml", [*SETTINGS, *overrides])
    return run.train(config, console=Console(file=said, width=200), **options), said.getvalue()


def sampled(folder: Path) -> list[float]:
    return [one.accuracy_sampled for one in read_metrics(folder / "metrics.jsonl")[1]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run whose best evaluation is neither its first nor its last."""
    folder = tmp_path_factory.mktemp("best")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        done, said = carry_out("name=unbroken")
        values = sampled(done)
        assert f"best     runs/unbroken/best: {read_best(done)}" in said
    assert 0 < values.index(max(values)) < 6, values
    return folder / done


def test_it_is_the_policy_of_the_best_evaluation(unbroken: Path):
    values = sampled(unbroken)
    at = values.index(max(values))
    assert read_best(unbroken) == best.Best(at, "held_out/sampled", max(values))
    state = load_file(unbroken / "states" / f"{at:06d}" / "tensors.safetensors")
    model, tokenizer = load_pretrained(str(unbroken / "best"))
    found = dict(model.named_parameters())
    assert state.keys() == found.keys() and len(tokenizer)
    assert all(state[name].equal(found[name]) for name in state)
    assert json.loads((unbroken / "summary.json").read_text())["best"]["iteration"] == at


PLACES = [
    (RunFolder, "save_checkpoint"),
    (Report, "evaluation"),
    (States, "save"),
    (run, "keep_best"),
    (run, "watch"),
]


def early_end(values: list[float]) -> int:
    """Where a run with these evaluations ends with a patience of 1."""
    settings = EvaluationConfig(best="held_out/sampled", patience=1)
    some = [replace(EVALUATED, accuracy_sampled=value) for value in values]
    return next(n for n in range(len(values)) if is_stuck(some[: n + 1], settings))


@pytest.mark.parametrize(("after", "patience"), [(False, "none"), (True, "none"), (True, "1")])
@pytest.mark.nightly
def test_a_kill_changes_no_bit_of_it(unbroken: Path, monkeypatch, after, patience):
    """Every ninth call of what writes something dies, before it or after it."""
    monkeypatch.chdir(unbroken.parents[1])
    calls = 0

    def dying(plain):
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            dies = calls % 9 == 0
            if dies and not after:
                raise KeyboardInterrupt
            found = plain(*args, **kwargs)
            if dies:
                raise KeyboardInterrupt
            return found

        return called

    for owner, name in PLACES:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for _ in range(60):
        try:
            name = f"name=killed-{after}-{patience}"
            done, _ = carry_out(name, f"evaluation.patience={patience}", resume=True)
            break
        except KeyboardInterrupt:
            continue
    values = sampled(unbroken)
    if patience != "none":
        values = values[: early_end(values) + 1]
    at = values.index(max(values))
    assert sampled(done) == values
    assert calls > 9
    assert read_best(done) == best.Best(at, "held_out/sampled", values[at])
    model = load_file(done / "best/model.safetensors")
    state = load_file(unbroken / f"states/{at:06d}/tensors.safetensors")
    assert all(state[name].equal(value) for name, value in model.items())


def test_patience_ends_a_run_and_it_stays_ended(unbroken: Path, monkeypatch):
    monkeypatch.chdir(unbroken.parents[1])
    values = sampled(unbroken)
    ends = early_end(values)
    assert ends < 6
    done, said = carry_out("name=early", "evaluation.patience=1")
    assert sampled(done) == values[: ends + 1]
    assert f"no better evaluation in 1: {read_best(done)} stays" in said
    carry_out("name=early", "evaluation.patience=1", resume=True)
    assert sampled(done) == values[: ends + 1]
    carry_out("name=early", resume=True)
    assert sampled(done) == values


def test_going_back_sets_a_later_one_aside(unbroken: Path, monkeypatch):
    monkeypatch.chdir(unbroken.parents[1])
    done, _ = carry_out("name=back")
    before = read_best(done)
    carry_out("name=back", resume=True, back_to=0)
    assert read_best(done) == before
    assert (done / "aside/1/best/best.json").is_file()


def test_a_best_one_of_lost_iterations_is_forgotten(unbroken: Path, tmp_path):
    assert best.forget_later(unbroken, 6) == ""
    (tmp_path / "best").mkdir()
    (tmp_path / "best/best.json").write_text('{"iteration": 5, "metric": "x/y", "value": 0.5}')
    assert "was of iteration 5" in best.forget_later(tmp_path, 4)
    assert read_best(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"iteration": null}', "\\u0000"])
def test_a_damaged_one_is_named(tmp_path, content):
    (tmp_path / "best").mkdir()
    (tmp_path / "best/best.json").write_text(content)
    with pytest.raises(ValueError, match=r"best\.json is damaged .*remove the folder .*best"):
        read_best(tmp_path)


def test_patience_counts_from_the_first_of_the_best():
    settings = EvaluationConfig(best="held_out/greedy", patience=2)
    some = [
        replace(EVALUATED, accuracy_greedy=value) for value in (math.nan, 0.5, 0.7, 0.7, 0.6, 0.8)
    ]
    assert [is_stuck(some[:n], settings) for n in range(7)] == [0, 0, 0, 0, 0, 1, 0]
    assert not is_stuck(some[:5], EvaluationConfig(best="held_out/greedy"))
    other = EvaluationConfig(best="held_out/sampled", patience=1)
    assert is_stuck(some[:2], other)
