"""``curves.png``: accuracy, length, reward and log-prob mismatch over the iterations of a run.

matplotlib is imported here and in long2short/comparison.py alone, when a run ends.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kimi_core.metrics import EvaluationMetrics, IterationMetrics
from kimi_core.run.folder import write_atomically


def draw_curves(
    iterations: Sequence[IterationMetrics], evaluations: Sequence[EvaluationMetrics], path: Path
) -> None:
    """Draw the four panels to a PNG at ``path``, replacing it in one step.

    Training values are lines; evaluations on held-out prompts are dots.
    """
    # A Figure without pyplot needs no display and no global state.
    figure = Figure(figsize=(10, 6.5))
    # Fixed margins: a layout engine draws everything twice.
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.95, wspace=0.16, hspace=0.32)
    (accuracy, length), (reward, mismatch) = figure.subplots(2, 2)
    steps = [m.iteration for m in iterations]
    evaluated = [e.iteration for e in evaluations]

    accuracy.plot(steps, [m.accuracy_sampled for m in iterations], ".-", label="training, sampled")
    accuracy.plot(
        evaluated, [e.accuracy_sampled for e in evaluations], "o", label="held out, sampled"
    )
    accuracy.plot(
        evaluated, [e.accuracy_greedy for e in evaluations], "s", label="held out, greedy"
    )
    for name in dict.fromkeys(name for one in evaluations for name in one.sets):
        found = [one.value(f"{name}/sampled") for one in evaluations]
        accuracy.plot(evaluated, found, "x", label=f"{name}, sampled")
    accuracy.set_ylim(-0.02, 1.02)
    _label(accuracy, "accuracy")

    length.plot(steps, [m.length_mean for m in iterations], ".-", label="training, sampled")
    length.plot(evaluated, [e.length_mean for e in evaluations], "o", label="held out, sampled")
    length.set_ylim(bottom=0)
    _label(length, "response length, tokens")

    reward.plot(steps, [m.reward_mean for m in iterations], ".-", label="training, mean")
    _label(reward, "reward")

    mismatch.plot(steps, [_drawable(m.logprob_gap_mean) for m in iterations], ".-", label="mean")
    mismatch.plot(steps, [_drawable(m.logprob_gap_max) for m in iterations], ".-", label="largest")
    mismatch.set_yscale("log")
    _label(mismatch, "|Δ log-prob| engine − trainer, nats")

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _drawable(gap: float) -> float:
    """Zero does not fit on a logarithmic axis, so it is left out."""
    return gap if gap > 0 else math.nan
