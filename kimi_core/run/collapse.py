"""Signs that a run falls apart, and the state to go back to.

A rule compares a run with itself: the last ``RECENT`` iterations with the ``BEFORE`` before them,
or an evaluation with the best one. Each asks for a change that is both large and beyond chance,
because a run that only learns slowly must not be called broken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kimi_core.config import Config
from kimi_core.metrics import EvaluationMetrics, IterationMetrics
from kimi_core.run.folder import RunFolder
from kimi_core.run.report import Report

RECENT = 3
BEFORE = 10
"""Iterations that are compared. A slope that takes longer than that is no cliff."""

ENTROPY_FACTOR = 5.0
ENTROPY_SMALL = 0.05
ENTROPY_LARGE = 0.5
"""Nats a token. A fall from below the one, or a rise to below the other, is ignored."""

LEARNS = 0.02
"""Rise of the accuracy with which an entropy may fall."""

NORM_FACTOR = 10.0

CHANCE = 4.0
"""Standard errors by which an accuracy must fall; the responses of a group are alike, so not 2."""


@dataclass(frozen=True)
class Sign:
    """A number of a run that has fallen off a cliff, or jumped."""

    rule: str
    """``accuracy``, ``entropy``, ``gradient norm`` or ``held-out accuracy``."""
    before: float
    now: float


def signs(
    iterations: Sequence[IterationMetrics],
    evaluations: Sequence[EvaluationMetrics],
    hard_after: int | None = None,
) -> list[Sign]:
    """What has collapsed as of the last records, in the order of the rules.

    Args:
        hard_after: the iteration from which on only hard prompts come, which lowers the accuracy.
    """
    found = []
    recent, before = iterations[-RECENT:], iterations[-RECENT - BEFORE : -RECENT]
    if len(before) == BEFORE:
        switched = hard_after is not None and hard_after >= before[0].iteration - 1
        rules = (None if switched else _accuracy, _entropy, _gradient)
        found = [sign for rule in rules if rule and (sign := rule(before, recent))]
    return [*found, *_held_out(evaluations)]


def _accuracy(
    before: Sequence[IterationMetrics], recent: Sequence[IterationMetrics]
) -> Sign | None:
    (p, n), (q, m) = _weighted(before), _weighted(recent)
    fell = n > 0 and m > 0 and 0 < p <= 1 and q < p / 2
    return Sign("accuracy", p, q) if fell and _beyond_chance(p, q, n, m) else None


def _weighted(some: Sequence[IterationMetrics]) -> tuple[float, int]:
    """Mean accuracy of the responses trained, and their number."""
    trained = [one for one in some if math.isfinite(one.accuracy_sampled)]
    n = sum(one.samples_trained for one in trained)
    total = sum(one.accuracy_sampled * one.samples_trained for one in trained)
    return total / max(1, n), n


def _beyond_chance(p: float, q: float, n: int, m: int) -> bool:
    return p - q > CHANCE * math.sqrt(p * (1 - p) * (1 / n + 1 / m))


def _entropy(before: Sequence[IterationMetrics], recent: Sequence[IterationMetrics]) -> Sign | None:
    usual, now = median(one.entropy for one in before), [one.entropy for one in recent]
    if not all(map(math.isfinite, (usual, *now))):
        return None
    # A policy that gets better also gets surer.
    learns = _weighted(recent)[0] > _weighted(before)[0] + LEARNS
    falls = usual > ENTROPY_SMALL and max(now) < usual / ENTROPY_FACTOR and not learns
    rises = min(now) > max(ENTROPY_LARGE, usual * ENTROPY_FACTOR)
    return Sign("entropy", usual, now[-1]) if falls or rises else None


def _gradient(
    before: Sequence[IterationMetrics], recent: Sequence[IterationMetrics]
) -> Sign | None:
    usual, now = median(one.grad_norm for one in before), [one.grad_norm for one in recent]
    jumps = usual > 0 and all(norm > NORM_FACTOR * usual for norm in now)  # Not where one is NaN.
    return Sign("gradient norm", usual, now[-1]) if jumps else None


def _held_out(evaluations: Sequence[EvaluationMetrics]) -> list[Sign]:
    if len(evaluations) < 2:
        return []
    best, last = _best(evaluations[:-1]), evaluations[-1]
    p, q = best.accuracy_greedy, last.accuracy_greedy
    fell = 0 < p <= 1 and q < p / 2 and _beyond_chance(p, q, best.n, last.n)
    return [Sign("held-out accuracy", p, q)] if fell else []


def _best(evaluations: Sequence[EvaluationMetrics]) -> EvaluationMetrics:
    return max(
        evaluations,
        key=lambda one: one.accuracy_greedy if math.isfinite(one.accuracy_greedy) else -math.inf,
    )


def good_state(evaluations: Sequence[EvaluationMetrics], numbers: Sequence[int]) -> int | None:
    """The state to go back to: the newest one with a good evaluation at it or after it.

    An evaluation is good if no other is better by more than two standard errors. None: no such
    state is there.
    """
    if not evaluations:
        return None
    best = _best(evaluations)
    p = min(1.0, max(0.0, best.accuracy_greedy))
    margin = 2 * math.sqrt(p * (1 - p) / best.n) if math.isfinite(p) else math.inf
    for one in reversed(evaluations):
        if not one.accuracy_greedy < best.accuracy_greedy - margin:
            there = [number for number in numbers if number <= one.iteration]
            return max(there) if there else None
    return None


def watch(report: Report, folder: RunFolder, config: Config) -> None:
    """Keep the state of the last good evaluation, and say what has collapsed since."""
    good = good_state(report.evaluations, folder.states.numbers())
    folder.states.pinned = good
    for sign in signs(report.iterations, report.evaluations, config.curriculum.hard_after):
        said = f"collapse: {sign.rule} was {sign.before:.3g} and is {sign.now:.3g}. "
        record = {**vars(sign), "good_state": good}
        report.collapse(record, said + _way_back(good, folder, config))


def _way_back(good: int | None, folder: RunFolder, config: Config) -> str:
    lower = f"trainer.learning_rate={config.trainer.learning_rate / 2:g}"
    if good is None:
        return f"No earlier state is there. Start a run with another name=... and {lower}"
    return (
        f"The state of iteration {good}, whose evaluation was good, is kept. To go back to it, "
        f"stop this run; then: kimi train {folder.path}/config.toml --resume --from {good} {lower}"
    )
