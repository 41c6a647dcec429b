"""Figure 3b: what a token budget does to an iteration when a few responses are very long.

The real loop samples lognormal responses, whose 99th percentile is 8 times the median, from a small
policy that learned their lengths. Its weights stand still, and loops with and without a budget take
turns. The same is simulated for 8 engines of an 8B model, where a step costs about the same however
few rows it has.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from simulate import MODELS, Lengths, costs_of, open_trajectories, positions_of
from simulation import Faults, Master, Rollout

from figures.plots import bars, figure, save
from figures.runs import TASKS, Runs
from figures.seeds import Mean, table
from figures.tasks import LONGEST, MEDIAN, SIGMA

BUDGETS = (None, MEDIAN, 2 * MEDIAN)
"""Tokens that a response may add in one iteration; None: no budget."""

POLICY = [
    "think",
    f"prompts.source={TASKS}:drafts",
    f"sft.data={TASKS}:draft_examples",
    "sft.steps=300",
    "sft.learning_rate=2e-3",
    "prompts.held_out=500",
    f"model.scratch.context={LONGEST + 8}",
    f"rollout.max_response_tokens={LONGEST}",
    "rollout.repeat_window=0",
    "rollout.prompts_per_iteration=16",
]

SIMULATED = Lengths(median=4_000, sigma=SIGMA, longest=32_000)
RESPONSES = 1_024
"""Begun in each simulated iteration, on 8 engines of one GPU each."""
SIMULATED_COLUMNS = ("million tokens", "rollout s", "busy")


MEASURED = {
    "tokens": "tokens",
    "most steps": "steps_most",
    "rollout CPU-s": "rollout_cpu_s",
    "slowest": "rollout_cpu_s_most",
    "iteration CPU-s": "cpu_s",
    "responses trained": "samples",
    "stale tokens": "stale_share",
}
"""Column → what ``fig3b_loops.py`` calls it."""


def run(runs: Runs, figures: Path) -> str:
    """Measure and simulate; return the tables."""
    policy = runs.sft("fig3b-policy", *POLICY, "seed=0")
    budgets = ["none" if one is None else str(one) for one in BUDGETS]
    command = (f"{policy}/checkpoint", *POLICY[1:], "--budgets", *budgets)
    folders = runs.each(
        lambda seed: runs.script("fig3b_loops.py", f"fig3b-{seed}", *command, "--seed", str(seed))
    )
    found = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    measured, simulated = {}, {}
    for number, budget in enumerate(BUDGETS):
        label = "no budget" if budget is None else f"{budget // MEDIAN} × median"
        loops = [seed["loops"][number] for seed in found]
        measured[label] = [[one[key] for one in loops] for key in MEASURED.values()]
        phases = [simulate(budget, seed) for seed in runs.seeds]
        simulated[label] = [[one[key] for one in phases] for key in SIMULATED_COLUMNS]
    _draw(measured, simulated, figures / "fig3b.png")
    lengths = [length for seed in found for length in seed["lengths"]]
    said = ", ".join(f"{one:.0f}" for one in np.quantile(lengths, [0.5, 0.9, 0.99]))
    return "\n\n".join(
        [
            f"{len(folders)} seeds. Lengths without a budget: median, 90 %, 99 % = {said}.",
            "Measured, each value of one iteration:",
            table(list(MEASURED), measured),
            f"Simulated, {RESPONSES} responses an iteration, 8 engines of 8B:",
            table(SIMULATED_COLUMNS, simulated),
        ]
    )


def simulate(budget: int | None, seed: int) -> dict[str, float]:
    """One rollout phase of a loop that has run for long, with budgets of 1 or 2 medians."""
    rng = np.random.default_rng(seed)
    budget = budget and budget * int(SIMULATED.median) // MEDIAN
    lengths = SIMULATED.draw(RESPONSES, rng)
    phases = 1.0 if budget is None else float(np.mean(-(-lengths // budget)))
    model = MODELS["8B"]
    phase = Rollout(
        open_trajectories(SIMULATED, round(RESPONSES * phases), budget, rng),
        engines=8,
        rows=1024,
        positions=positions_of(model),
        costs=costs_of(model),
        master=Master(),
        faults=Faults(),
        rng=rng,
    ).run()
    busy = phase.busy_s / (8 * phase.seconds)
    return {"million tokens": phase.tokens / 1e6, "rollout s": phase.seconds, "busy": busy}


def _draw(
    measured: dict[str, Sequence[Sequence[float]]],
    simulated: dict[str, Sequence[Sequence[float]]],
    path: Path,
) -> None:
    sheet, axes = figure(4, width=13)
    panels = [
        ("tokens an iteration", measured, 0),
        ("decode steps of the longest iteration", measured, 1),
        ("CPU-s an iteration, rollout", measured, 2),
        ("rollout s, simulated: 8 engines of 8B", simulated, 1),
    ]
    for ax, (title, rows, column) in zip(axes, panels, strict=True):
        bars(ax, title, {label: Mean.of(columns[column]) for label, columns in rows.items()})
    save(sheet, path)
