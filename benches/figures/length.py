"""The length reward from the start of RL, after a warm-up, and not at all (section 2.3.3).

The report warms it up because it may slow learning at first. So RL begins where few answers are
right, and right ones are longer than wrong ones.
"""

from pathlib import Path

from figures.plots import curves, figure, save
from figures.runs import Runs
from figures.seeds import difference, table
from figures.start import ITERATIONS, evaluations, over_seeds, plain, train

WEIGHT = "reward.length_weight=0.3"
ARMS = {
    "from the start": [WEIGHT],
    "after 20 iterations": [WEIGHT, f"reward.length_warmup={ITERATIONS // 2}"],
}


def run(runs: Runs, figures: Path) -> str:
    """Train, plot and return the table."""
    folders = {"no length reward": runs.each(lambda seed: plain(runs, seed))}
    for number, (label, settings) in enumerate(ARMS.items()):
        folders[label] = runs.each(
            lambda seed, n=number, s=settings: train(runs, f"length-{n}", seed, *s)
        )
    sheet, panels = figure(2)
    for axes, key in zip(panels, ("accuracy_sampled", "length_mean"), strict=True):
        lines = {label: over_seeds(some, key) for label, some in folders.items()}
        curves(axes, key.replace("_", ", "), "iteration", lines)
    save(sheet, figures / "length.png")
    last = {label: [evaluations(one)[-1] for one in some] for label, some in folders.items()}
    keys = ("accuracy_greedy", "accuracy_sampled", "length_mean")
    rows = {
        label: [[getattr(one, k) for one in some] for k in keys] for label, some in last.items()
    }
    lines = [f"{len(runs.seeds)} seeds, mean with 95 % interval:", ""]
    lines += [table(["greedy", "sampled", "tokens"], rows), ""]
    late, early = last["after 20 iterations"], last["from the start"]
    for key in keys[1:]:
        found = difference([getattr(a, key) for a in late], [getattr(b, key) for b in early])
        lines.append(f"with warm-up − without, {key}: {found}")
    return "\n".join(lines)
