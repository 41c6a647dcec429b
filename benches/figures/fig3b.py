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


def run(runs: Runs, figures: Path) -> str:
    """Measure and simulate; return the table."""
    policy = runs.sft("fig3b-policy", *POLICY, "seed=0")
    budgets = ["none" if one is None else str(one) for one in BUDGETS]
    command = (f"{policy}/checkpoint", *POLICY[1:], "--budgets", *budgets)
    folders = runs.each(
        lambda seed: runs.script("fig3b_loops.py", f"fig3b-{seed}", *command, "--seed", str(seed))
    )
    measured = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    simulated = [[simulate(budget, seed) for seed in runs.seeds] for budget in BUDGETS]
    rows, several = {}, {}
    for index, budget in enumerate(BUDGETS):
        label = "no budget" if budget is None else f"{budget // MEDIAN} × median"
        one_each = [seed["loops"][index] for seed in measured]
        several[label] = [
            [one["tokens"] for one in one_each],
            [one["steps_most"] for one in one_each],
            [one["rollout_cpu_s"] for one in one_each],
            [one["rollout_cpu_s_most"] for one in one_each],
            [one["cpu_s"] for one in one_each],
            [one["samples"] for one in one_each],
            [one["stale_share"] for one in one_each],
        ]
        rows[label] = [
            [one["tokens"] / 1e6 for one in simulated[index]],
            [one["seconds"] for one in simulated[index]],
            [one["busy_share"] for one in simulated[index]],
        ]
    _draw(several, rows, figures / "fig3b.png")
    lengths = [length for seed in measured for length in seed["lengths"]]
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99])
    said = ", ".join(f"{q:.0f}" for q in quantiles)
    head = ["tokens", "most steps", "rollout CPU-s", "slowest", "iteration CPU-s"]
    head += ["responses trained", "stale tokens"]
    return "\n\n".join(
        [
            f"{len(runs.seeds)} seeds. Lengths without a budget: median, 90 %, 99 % = {said}.",
            "Measured, each value of one iteration:\n\n" + table(head, several),
            f"Simulated, {RESPONSES} responses an iteration, 8 engines of 8B:\n\n"
            + table(["million tokens", "rollout s", "busy"], rows),
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
    return {"tokens": phase.tokens, "seconds": phase.seconds, "busy_share": busy}


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
