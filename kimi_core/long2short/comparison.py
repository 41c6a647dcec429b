"""What the methods of section 2.4 cost and bring: a table, and Figure 7's plot."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One model, evaluated on the held-out prompts."""

    method: str
    """``long``: the model that all others are made from."""
    seed: int
    """Seed of everything random in the method, and of the sampled half of the evaluation."""
    accuracy_greedy: float
    accuracy_sampled: float
    tokens: float
    """Mean length of a sampled response."""
    n: int
    """Held-out prompts."""
    samples: int
    """Responses that were drawn to make the model. ``shortest`` and ``dpo`` share theirs."""
    cpu_s: float
    """CPU-seconds of sampling and training, without those of a part that a crash interrupted."""
    note: str = ""
    """What the model was made of."""


COLUMNS = {
    "greedy": lambda point: point.accuracy_greedy,
    "sampled": lambda point: point.accuracy_sampled,
    "tokens": lambda point: point.tokens,
    "samples": lambda point: point.samples,
    "CPU-s": lambda point: point.cpu_s,
}


def table(points: Sequence[Point]) -> str:
    """A row for each method in Markdown: mean ± standard deviation over the seeds.

    The column after the tokens has them as a share of the long model's.
    """
    by_method = _by_method(points)
    long = mean(point.tokens for point in by_method.get("long", points))
    lines = [
        "| method | seeds | greedy | sampled | tokens | of long | samples | CPU-s |",
        "|---" * 8 + "|",
    ]
    for method, some in by_method.items():
        cells = [_spread([value(one) for one in some]) for value in COLUMNS.values()]
        cells.insert(3, f"{mean(one.tokens for one in some) / long:.2f}")
        lines.append(f"| {method} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(points: Sequence[Point]) -> bytes:
    """Figure 7 as a PNG: accuracy against mean tokens, sampled and greedy.

    Each method has a large dot with its standard deviations over the seeds, and small ones for the
    seeds.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2), ("sampled", "greedy"), strict=True):
        for number, (method, some) in enumerate(_by_method(points).items()):
            _plot(axes, f"C{number}", method, some, which)
        axes.set(title=f"accuracy, {which}", xlabel="mean tokens of a response")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _plot(axes: Axes, color: str, method: str, points: Sequence[Point], which: str) -> None:
    tokens = [point.tokens for point in points]
    accuracy = [COLUMNS[which](point) for point in points]
    axes.plot(tokens, accuracy, ".", color=color, alpha=0.4)
    axes.errorbar(
        mean(tokens),
        mean(accuracy),
        xerr=stdev(tokens) if len(points) > 1 else 0,
        yerr=stdev(accuracy) if len(points) > 1 else 0,
        fmt="o",
        color=color,
        label=method,
    )


def _by_method(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each method, in the order of their first ones."""
    names = dict.fromkeys(point.method for point in points)
    return {name: [point for point in points if point.method == name] for name in names}


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 and stdev(values) else ""
    return f"{mean(values):.4g}{spread}"
