"""Figure 5: accuracy and response length rise together over RL, on two tasks."""

from pathlib import Path

from figures.plots import curves, figure, save
from figures.runs import TASKS, Runs
from figures.seeds import difference, table
from figures.start import CHEAP, evaluations, over_seeds, plain

SUMS = [
    "smollm2",
    f"prompts.source={TASKS}:sums",
    f"reward.function={TASKS}:last_number",
    "prompts.held_out=195",
]
START = [
    f"sft.data={TASKS}:sum_examples",
    "sft.steps=250",
    "sft.batch_size=16",
    "sft.learning_rate=3e-4",
]
TRAINED = [
    "sft.data=none",
    "iterations=30",
    "rollout.prompts_per_iteration=12",
    "rollout.max_response_tokens=28",
    "trainer.learning_rate=5e-5",
    "evaluation.every=10",
    "evaluation.prompts=195",
    "evaluation.samples=4",
    *CHEAP,
]
"""SmolLM2-135M-Instruct, its top 8 layers: 96 samples an iteration."""


def run(runs: Runs, figures: Path) -> str:
    """``think``: train, plot and return the table."""
    return _compared(runs, runs.each(lambda seed: plain(runs, seed)), figures / "fig5.png")


def run_smollm2(runs: Runs, figures: Path) -> str:
    """SmolLM2 on sums of four digits: train, plot and return the table. All seeds have one start,
    that of the SFT with seed 0."""
    start = runs.sft("sums", *SUMS, *START, "seed=0") / "checkpoint"
    given = [*SUMS, *TRAINED, f"model.name={start}"]
    folders = runs.each(lambda seed: runs.train(f"sums-{seed}", *given, f"seed={seed}"))
    return _compared(runs, folders, figures / "fig5-smollm2.png")


def _compared(runs: Runs, folders: list[Path], plot: Path) -> str:
    sheet, (accuracy, length) = figure(2)
    lines = {name: over_seeds(folders, f"accuracy_{name}") for name in ("sampled", "greedy")}
    curves(accuracy, "held-out accuracy", "iteration", lines)
    curves(
        length,
        "response length, tokens",
        "iteration",
        {"sampled": over_seeds(folders, "length_mean")},
    )
    save(sheet, plot)
    before = [evaluations(one)[0] for one in folders]
    after = [evaluations(one)[-1] for one in folders]
    rows, gains = {"before RL": [], "after RL": []}, []
    for key in ("accuracy_greedy", "accuracy_sampled", "length_mean"):
        start, end = ([getattr(one, key) for one in some] for some in (before, after))
        rows["before RL"].append(start)
        rows["after RL"].append(end)
        gains.append(f"gain, {key}: {difference(end, start)}")
    head = f"{len(runs.seeds)} seeds, mean with 95 % interval:"
    return "\n\n".join([head, table(["greedy", "sampled", "tokens"], rows), "\n".join(gains)])
