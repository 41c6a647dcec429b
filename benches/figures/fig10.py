"""Figure 10: negative gradients against ReST, which only fits right answers, at equal samples.

Both begin where 8 % of the sampled answers are right. Each is tried on policy and in four large
batches, on a seed that counts nowhere else, and the more accurate way is used.
"""

from pathlib import Path

from figures.plots import curves, figure, save
from figures.runs import TASKS, Runs
from figures.seeds import Mean, difference, table
from figures.start import SAMPLES, evaluations, plain, start, train

BATCHES = [
    "iterations=4",
    "evaluation.every=1",
    "rollout.prompts_per_iteration=320",
    "trainer.updates_per_iteration=20",
]
"""2,560 samples at a time, each used in one of 20 updates."""

MIRROR_DESCENT = {
    "on policy, lr 1e-4, τ 0.01": [],  # As ``think`` has it.
    "batches, lr 1e-4, τ 0.1": [*BATCHES, "trainer.tau=0.1"],
}
REST = {
    "on policy, lr 3e-4": [],
    "batches, lr 3e-4, 4 epochs": ["--learning-rate", "3e-4", "--epochs", "4"],
}
METHODS = {"mirror descent": list(MIRROR_DESCENT), "ReST, best of 8": list(REST)}
SEARCH_SEED = 100


def run(runs: Runs, figures: Path) -> str:
    """Search, train, plot and return the table."""
    tried = {
        (method, label): _accuracy(_make(runs, method, label, SEARCH_SEED))
        for method, labels in METHODS.items()
        for label in labels
    }
    used = {m: max(labels, key=lambda one: tried[m, one]) for m, labels in METHODS.items()}
    found = {
        method: runs.each(lambda seed, m=method: _make(runs, m, used[m], seed)) for method in used
    }
    sheet, (axes,) = figure(1, width=6)
    lines = {f"{m}, {used[m]}": _against_samples(some) for m, some in found.items()}
    curves(axes, "sampled accuracy, held out", "samples", lines)
    save(sheet, figures / "fig10.png")
    rows = {
        f"{method}, {used[method]}": [[evaluations(one)[-1].accuracy_greedy for one in some], ends]
        for method, some in found.items()
        if (ends := [_accuracy(one) for one in some])
    }
    ours, theirs = ([_accuracy(one) for one in some] for some in found.values())
    lines_out = [f"Settings, tried on seed {SEARCH_SEED}, sampled accuracy:", ""]
    lines_out += [f"* {m}, {label}: {value:.3f}" for (m, label), value in tried.items()]
    lines_out += ["", f"{len(ours)} seeds, {SAMPLES} samples each, mean with 95 % interval:", ""]
    lines_out += [table(["greedy", "sampled"], rows), ""]
    lines_out.append(f"mirror descent − ReST, sampled: {difference(ours, theirs)}")
    return "\n".join(lines_out)


def _make(runs: Runs, method: str, label: str, seed: int) -> Path:
    """A run of 10,240 samples by a method in one of its settings."""
    number = METHODS[method].index(label)
    if method == "mirror descent":
        settings = MIRROR_DESCENT[label]
        return (
            train(runs, f"fig10-omd-{number}", seed, *settings) if settings else plain(runs, seed)
        )
    if not REST[label]:
        on_policy = [f"trainer.objective={TASKS}:best", "trainer.learning_rate=3e-4"]
        return train(runs, f"fig10-rest-{number}", seed, *on_policy)
    where = [str(start(runs, seed)), "--seed", str(seed)]
    return runs.script("fig10_rest.py", f"fig10-rest-{number}-{seed}", *where, *REST[label])


def _accuracy(folder: Path) -> float:
    return evaluations(folder)[-1].accuracy_sampled


def _against_samples(folders: list[Path]) -> tuple[list[float], list[Mean]]:
    columns = list(zip(*map(evaluations, folders), strict=True))
    last = columns[-1][0].iteration
    means = [Mean.of([one.accuracy_sampled for one in column]) for column in columns]
    return [column[0].iteration * SAMPLES / last for column in columns], means
