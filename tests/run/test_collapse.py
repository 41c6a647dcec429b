"""Signs of a run that falls apart: found while it happens, and not where a run is only noisy."""

import json
import math
import random
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core.config import Config
from kimi_core.metrics import EvaluationMetrics, IterationMetrics, read_lines
from kimi_core.run.collapse import BEFORE, RECENT, Sign, good_state, signs, watch
from kimi_core.run.config_file import load_config
from kimi_core.run.folder import RunFolder
from kimi_core.run.report import Report
from kimi_core.run.run import train

HEALTHY = IterationMetrics(
    iteration=1, policy_version=0, wall_s=1.0, cpu_s=1.0, rollout_s=0.6, train_s=0.4,
    reward_mean=0.6, accuracy_sampled=0.6, length_mean=5.0, tokens_sampled=320, tokens_per_s=99.0,
    decode_steps=8, trajectories_finished=64, trajectories_unfinished=0, repeat_stops=0,
    samples_trained=64, samples_trained_total=64, tokens_stale_share=0.0, max_staleness=0,
    logprob_gap_mean=0.0, logprob_gap_max=0.0, reference_recomputed=False, loss=0.1, grad_norm=1.0,
    entropy=0.4,
)  # fmt: skip

EVALUATED = EvaluationMetrics(
    iteration=0, policy_version=0, accuracy_greedy=0.6, accuracy_sampled=0.5, length_mean=5.0,
    n=100, seed=1,
)  # fmt: skip


def run_of(**numbers) -> list[IterationMetrics]:
    """Iterations from 1 on, with lists of numbers."""
    count = max(len(values) for values in numbers.values())
    rows = [{name: values[row] for name, values in numbers.items()} for row in range(count)]
    return [replace(HEALTHY, iteration=row + 1, **one) for row, one in enumerate(rows)]


def first(iterations: list[IterationMetrics], **options) -> tuple[int, str] | None:
    """The first iteration after which there is a sign, and its rule."""
    for done in range(1, len(iterations) + 1):
        if found := signs(iterations[:done], [], **options):
            return done, found[0].rule
    return None


class TestIterations:
    def test_an_accuracy_that_falls_off_a_cliff_is_found_at_once(self):
        falls = run_of(accuracy_sampled=[0.6] * 15 + [0.05] * 5)
        assert first(falls) == (17, "accuracy")  # The mean of 0.6, 0.05, 0.05 is below half.

    def test_hard_prompts_by_config_are_no_collapse(self):
        falls = run_of(accuracy_sampled=[0.6] * 15 + [0.05] * 5)
        assert first(falls, hard_after=15) is None

    def test_a_slope_is_no_cliff(self):
        assert first(run_of(accuracy_sampled=[0.6 - 0.01 * n for n in range(50)])) is None

    @pytest.mark.parametrize("accuracy", [0.02, 0.1, 0.3, 0.6, 0.95])
    def test_chance_is_no_collapse(self, accuracy):
        chance = random.Random(0)
        for _ in range(20):
            right = [sum(chance.random() < accuracy for _ in range(16)) / 16 for _ in range(100)]
            some = [replace(one, samples_trained=16) for one in run_of(accuracy_sampled=right)]
            assert first(some) is None

    def test_an_entropy_that_falls(self):
        entropy = [0.5] * 12 + [0.02] * 4
        assert first(run_of(entropy=entropy)) == (15, "entropy")
        rises = [0.3] * 12 + [0.9] * 4  # A policy that learns gets surer.
        assert first(run_of(entropy=entropy, accuracy_sampled=rises)) is None
        assert first(run_of(entropy=[0.03] * 12 + [0.001] * 4)) is None

    def test_an_entropy_that_rises(self):
        assert first(run_of(entropy=[0.3] * 12 + [4.0] * 4)) == (15, "entropy")
        assert first(run_of(entropy=[0.01] * 12 + [0.1] * 4)) is None

    def test_a_gradient_that_jumps(self):
        assert first(run_of(grad_norm=[1.0] * 12 + [30.0] * 4)) == (15, "gradient norm")
        assert first(run_of(grad_norm=[1.0] * 12 + [300.0] + [1.0] * 9)) is None  # A spike.
        assert first(run_of(grad_norm=[0.0] * 12 + [3.0] * 4)) is None

    def test_numbers_that_were_not_measured(self):
        nothing = [math.nan] * 20
        silent = run_of(accuracy_sampled=nothing, entropy=nothing, grad_norm=nothing)
        assert first([replace(one, samples_trained=0) for one in silent]) is None
        assert first(silent[: BEFORE + RECENT - 1]) is None


class TestEvaluations:
    def evaluations(self, *accuracies: float) -> list[EvaluationMetrics]:
        return [
            replace(EVALUATED, iteration=10 * n, accuracy_greedy=one)
            for n, one in enumerate(accuracies)
        ]

    def test_an_evaluation_far_below_the_best_one(self):
        assert signs([], self.evaluations(0.3, 0.6, 0.1)) == [Sign("held-out accuracy", 0.6, 0.1)]
        assert signs([], self.evaluations(0.3, 0.6, 0.4)) == []
        assert signs([], self.evaluations(0.6)) == []

    def test_the_state_of_the_last_good_evaluation_is_the_one_to_go_back_to(self):
        numbers = [0, 5, 10, 20, 30, 31]
        assert good_state(self.evaluations(0.3, 0.6, 0.1), numbers) == 10
        assert good_state(self.evaluations(0.3, 0.6, 0.58, 0.1), numbers) == 20  # As good as 0.6.
        assert good_state(self.evaluations(0.3, 0.6, 0.58, 0.7), numbers) == 30
        assert good_state(self.evaluations(0.3, 0.6), [0, 8]) == 8  # save_every = 8
        assert good_state(self.evaluations(0.3, 0.6), [19, 20]) is None
        assert good_state([], numbers) is None


def test_it_is_said_once_and_written_down(tmp_path):
    config, said = Config(), StringIO()
    with RunFolder.create(tmp_path, config) as folder:
        for number in (0, 10):
            folder.save_state(number, [], {})
        report = Report(tmp_path, total_iterations=60, console=Console(file=said, width=200))
        report.evaluation(EVALUATED)
        for one in run_of(accuracy_sampled=[0.6] * 15 + [0.05] * 25):
            report.iteration(one)
            watch(report, folder, config)
    assert folder.states.pinned == 0
    lines = [one for _, one in read_lines(tmp_path / "metrics.jsonl") if one["kind"] == "collapse"]
    assert [(one["iteration"], one["rule"], one["good_state"]) for one in lines] == [
        (17, "accuracy", 0)
    ]
    assert lines[0]["before"] == pytest.approx(0.6) and lines[0]["now"] < 0.3
    assert said.getvalue().count("warning: collapse: accuracy was 0.6 and is 0.233. ") == 1
    assert (
        f"kimi train {tmp_path}/config.toml --resume --from 0 trainer.learning_rate=5e-05"
        in said.getvalue()
    )


def test_the_good_state_outlives_the_newest(tmp_path, monkeypatch):
    """A whole run whose held-out accuracy is best at the start: state 0 stays, and tells it."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    # Right at the first evaluation and never after it: as if the policy had collapsed at once.
    Path("reward.py").write_text(
        "calls = 0\ndef f(prompt, text):\n"
        "    global calls\n    calls += 1\n    return float(calls <= 30)\n"
    )
    settings = ["reward.function=reward.py:f", "prompts.held_out=13", "iterations=4"]
    said = StringIO()
    config = load_config("tiny.toml", [*settings, "evaluation.every=2", "evaluation.prompts=13"])
    folder = train(config, console=Console(file=said, width=200))
    assert sorted(path.name for path in (folder / "states").iterdir()) == [
        "000000", "000003", "000004",
    ]  # fmt: skip
    assert "collapse: held-out accuracy was 1 and is 0. The state of iteration 0" in said.getvalue()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [one["iteration"] for one in lines if one["kind"] == "collapse"] == [2]
