"""Figure 9: uniform prompts and then hard ones only, against uniform prompts throughout.

Two thirds of the training prompts are products of one or two digits, which the start answers
mostly right, and the rest products of three digits. Accuracy counts on held-out hard ones.
"""

from pathlib import Path

from figures.plots import curves, figure, save
from figures.runs import TASKS, Runs
from figures.seeds import Mean, difference, table
from figures.start import CHEAP, ITERATIONS, evaluations

TASK = [
    "think",
    f"prompts.source={TASKS}:graded",
    "prompts.held_out=900",
]
START = [f"sft.data={TASKS}:graded_examples", "sft.steps=300"]
UNIFORM = "curriculum.prioritized=false"
ARMS = {
    "uniform": [UNIFORM],
    "uniform, then hard only": [UNIFORM, f"curriculum.hard_after={ITERATIONS // 2}"],
}
LEVELS = ("hard", "easy")


def run(runs: Runs, figures: Path) -> str:
    """Train, plot and return the table."""
    folders = {
        label: runs.each(
            lambda seed, n=number, s=settings: _train(runs, f"fig9-{n}-{seed}", seed, s)
        )
        for number, (label, settings) in enumerate(ARMS.items())
    }
    sheet, panels = figure(2)
    for axes, level in zip(panels, LEVELS, strict=True):
        lines = {label: _by_iteration(some, level) for label, some in folders.items()}
        curves(axes, f"sampled accuracy, {level} held-out prompts", "iteration", lines)
    save(sheet, figures / "fig9.png")
    rows = {"before RL": [_values(folders["uniform"], level, 0) for level in LEVELS]}
    rows |= {label: [_values(some, lv, -1) for lv in LEVELS] for label, some in folders.items()}
    lines = [f"{len(runs.seeds)} seeds, sampled accuracy, mean with 95 % interval:", ""]
    lines += [table(LEVELS, rows), ""]
    for label in list(ARMS)[1:]:
        for level in LEVELS:
            pair = [_values(folders[one], level, -1) for one in (label, "uniform")]
            lines.append(f"{label} − uniform, {level}: {difference(*pair)}")
    return "\n".join(lines)


def _train(runs: Runs, name: str, seed: int, settings: list[str]) -> Path:
    start = runs.sft(f"graded-{seed}", *TASK, *START, f"seed={seed}") / "checkpoint"
    common = [f"iterations={ITERATIONS}", "evaluation.every=10", "evaluation.prompts=300", *CHEAP]
    given = [f"model.name={start}", "sft.data=none", f"seed={seed}"]
    return runs.train(name, *TASK, *common, *settings, *given)


def _values(folders: list[Path], level: str, at: int) -> list[float]:
    return [evaluations(folder)[at].sampled_by_domain[level] for folder in folders]


def _by_iteration(folders: list[Path], level: str) -> tuple[list[float], list[Mean]]:
    steps = [one.iteration for one in evaluations(folders[0])]
    return steps, [Mean.of(_values(folders, level, at)) for at in range(len(steps))]
