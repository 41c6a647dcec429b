"""Plots of means with intervals over seeds, without pyplot, so that no display is needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.seeds import Mean


def figure(panels: int, *, width: float = 10.0) -> tuple[Figure, Sequence[Axes]]:
    """An empty sheet with panels side by side."""
    sheet = Figure(figsize=(width, 3.8), layout="constrained")
    return sheet, np.atleast_1d(sheet.subplots(1, panels)).tolist()


def save(sheet: Figure, path: Path) -> None:
    sheet.savefig(path, dpi=110)


def bars(axes: Axes, title: str, rows: dict[str, Mean]) -> None:
    """A bar for each label, with its interval."""
    for number, (label, one) in enumerate(rows.items()):
        error = [[one.mean - one.low], [one.high - one.mean]]
        axes.bar(label, one.mean, color=f"C{number}", yerr=error, capsize=4)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="y")


def curves(
    axes: Axes, title: str, x_label: str, lines: dict[str, tuple[Sequence[float], list[Mean]]]
) -> None:
    """A line for each label, with its interval as a band.

    Args:
        lines: label → the x values, and a mean at each.
    """
    for number, (label, (x, means)) in enumerate(lines.items()):
        color = f"C{number}"
        axes.plot(x, [one.mean for one in means], ".-", color=color, label=label)
        low, high = [one.low for one in means], [one.high for one in means]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel=x_label)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
