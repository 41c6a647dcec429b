"""What a token budget costs: CPU seconds a finished sample, against rollouts without one.

    pytest benches/bench_partial.py                # about 3 minutes

A continued trajectory has to be prefilled again under the new weights; in return the batches are
larger and no iteration waits for its longest response. The same policy, taken from the default run
after a few iterations of RL so that its responses have real lengths, goes through both loops in
turn. Its weights stand still meanwhile, so both sample the same distribution; whole iterations
count, training included.
"""

import time

import numpy as np
import pytest
from rich.console import Console

from kimi_core.loop import Loop
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.fine_tuning import fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = "configs/think.toml"
BUDGET = 24
ROUNDS = 5
ITERATIONS = 4
"""Of each loop, in each round."""

WARM_UP = 6
"""Iterations until as many trajectories end in one as begin."""


@pytest.fixture(scope="module")
def policy():
    config = load_config(CONFIG, ["sft.steps=600"])
    parts = build(config)
    fine_tune(parts, config, Console(quiet=True))
    parts.loop.start()
    for _ in range(8):
        parts.loop.iterate()
    return parts.model.state_dict()


def loop_with(policy, *overrides: str) -> Loop:
    parts = build(load_config(CONFIG, ["trainer.learning_rate=1e-30", *overrides]))
    parts.model.load_state_dict(policy)
    parts.loop.start()
    return parts.loop


def test_a_budget_costs_little(policy, ratios, benchmark):
    full = loop_with(policy)
    partial = loop_with(policy, f"rollout.token_budget={BUDGET}")
    steps = [partial.iterate().decode_steps for _ in range(WARM_UP)]
    full.iterate()
    cost: dict[str, list[float]] = {"full": [], "partial": []}

    def one_round() -> None:
        for name, loop in (("full", full), ("partial", partial)):
            started, samples = time.process_time(), loop.samples_trained
            for _ in range(ITERATIONS):
                metrics = loop.iterate()
                if name == "partial":
                    steps.append(metrics.decode_steps)
            spent = time.process_time() - started
            cost[name].append(1000 * spent / (loop.samples_trained - samples))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    assert max(steps) <= BUDGET
    medians = {name: float(np.median(values)) for name, values in cost.items()}
    ratio = float(np.median(np.array(cost["full"]) / np.array(cost["partial"])))
    ratios.record(
        f"budget {BUDGET} of 96",
        "full rollouts",
        ratio,
        minimum=1 / 1.15,
        detail=f"CPU ms a sample: {medians['partial']:.2f} and {medians['full']:.2f}",
    )
