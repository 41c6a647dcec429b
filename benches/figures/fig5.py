"""Figure 5: accuracy and response length rise together over RL."""

from pathlib import Path

from figures.plots import curves, figure, save
from figures.runs import Runs
from figures.seeds import difference, table
from figures.start import evaluations, over_seeds, plain


def run(runs: Runs, figures: Path) -> str:
    """Train, plot and return the table."""
    folders = runs.each(lambda seed: plain(runs, seed))
    sheet, (accuracy, length) = figure(2)
    lines = {name: over_seeds(folders, f"accuracy_{name}") for name in ("sampled", "greedy")}
    curves(accuracy, "held-out accuracy", "iteration", lines)
    curves(
        length,
        "response length, tokens",
        "iteration",
        {"sampled": over_seeds(folders, "length_mean")},
    )
    save(sheet, figures / "fig5.png")
    before = [evaluations(one)[0] for one in folders]
    after = [evaluations(one)[-1] for one in folders]
    rows, gains = {"before RL": [], "after RL": []}, []
    for key in ("accuracy_greedy", "accuracy_sampled", "length_mean"):
        start, end = ([getattr(one, key) for one in some] for some in (before, after))
        rows["before RL"].append(start)
        rows["after RL"].append(end)
        gains.append(f"gain, {key}: {difference(end, start)}")
    head = f"{len(folders)} seeds, mean with 95 % interval:"
    return "\n\n".join([head, table(["greedy", "sampled", "tokens"], rows), "\n".join(gains)])
