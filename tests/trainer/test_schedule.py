"""The learning rate over a run: its shapes, and that a resume changes no bit of it."""

import math
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import TINY

from kimi_core.config import ScheduleConfig, SftScheduleConfig
from kimi_core.metrics import read_lines, read_metrics
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.trainer.schedule import share_of_peak

SETTINGS = [
    "reward.function=reward.py:some",
    "trainer.learning_rate=1e-2",
    "trainer.schedule.shape=cosine",
    "trainer.schedule.warmup=0.34",
    "trainer.schedule.lowest=0",
    "sft.schedule.shape=linear",
    "sft.data=multiply",
    "sft.steps=4",
]
REWARD = """
def some(prompt, response):
    return sum(character in "1234" for character in response) / 8
"""


def test_constant_is_the_default():
    assert {share_of_peak(ScheduleConfig(), step, 7) for step in range(9)} == {1.0}


def test_sft_rises_over_a_twentieth_and_falls_to_a_tenth_as_a_cosine():
    shares = [share_of_peak(SftScheduleConfig(), step, 100) for step in range(101)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[5 + 95 // 2] == pytest.approx(0.55, abs=0.01)  # half-way down
    assert shares[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(shares[5:]))
    # The bits of runs of earlier versions.
    for step in range(5, 100):
        assert shares[step] == 0.1 + 0.45 * (1 + math.cos(math.pi * ((step - 5) / 95)))


@pytest.mark.parametrize("steps", [0, 1, 2, 19])
def test_sft_of_a_few_steps_starts_at_the_peak(steps):
    assert share_of_peak(SftScheduleConfig(), 0, steps) == 1
    assert all(0.1 <= share_of_peak(SftScheduleConfig(), n, steps) <= 1 for n in range(steps + 1))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_every_shape_stays_between_its_ends(shape):
    for warmup in (0.0, 0.3, 0.99):
        schedule = ScheduleConfig(shape=shape, warmup=warmup, lowest=0.25)
        shares = [share_of_peak(schedule, step, 20) for step in range(25)]
        assert all(0 < one <= 1 for one in shares) and max(shares) == 1
        assert shares[-1] == (1 if shape == "constant" else pytest.approx(0.25))


def carry_out(*overrides: str, **options) -> Path:
    config = load_config("tiny.toml", [*SETTINGS, *overrides])
    return train(config, console=Console(file=StringIO()), **options)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_resumed_run_has_the_rates_and_the_bits_of_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("reward.py").write_text(REWARD)
    whole = carry_out("iterations=3", "name=whole")
    rates = [one.learning_rate for one in read_metrics(whole / "metrics.jsonl")[0]]
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3])
    monkeypatch.setattr("kimi_core.run.run.state.save", _dies_after(2))
    with pytest.raises(KeyboardInterrupt):
        carry_out("iterations=3", "name=broken")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    broken = carry_out("iterations=3", "name=broken", resume=True)
    weights = [load_file(one / "states/000003/tensors.safetensors") for one in (whole, broken)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert [one.learning_rate for one in read_metrics(broken / "metrics.jsonl")[0]] == rates
    longer = carry_out("iterations=4", "name=broken", resume=True)
    changed = [one for _, one in read_lines(longer / "metrics.jsonl") if one["kind"] == "change"]
    assert [(one["setting"], one["now"]) for one in changed] == [("iterations", 4)]


def _dies_after(saves: int):
    from kimi_core.run import state

    plain, done = state.save, []

    def save(*args):
        plain(*args)
        done.append(args)
        if len(done) == saves:
            raise KeyboardInterrupt

    return save
