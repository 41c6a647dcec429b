"""One seed of Figure 3b: loops with each token budget in turn, one frozen policy.

    python benches/figures/fig3b_loops.py FOLDER MODEL key=value ... --budgets none 32 --seed 0

Writes ``summary.json`` into FOLDER.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

from kimi_core.cli.settings import CONFIGS
from kimi_core.loop import Loop
from kimi_core.metrics import IterationMetrics
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config

ITERATIONS = 12
"""Measured of each loop."""


def loop_of(settings: list[str], budget: str) -> Loop:
    """A loop whose weights stand still."""
    fixed = ["sft.data=none", "trainer.learning_rate=1e-30", f"rollout.token_budget={budget}"]
    loop = build(load_config(CONFIGS / "think.toml", [*settings, *fixed])).loop
    loop.start()
    return loop


def iterate(loop: Loop) -> tuple[IterationMetrics, float, float]:
    """One iteration: its metrics, and the CPU-seconds of its rollout and in all."""
    sampled: list[float] = []
    loop.on_rollout = lambda rollout: sampled.append(time.process_time())
    started = time.process_time()
    metrics = loop.iterate()
    return metrics, sampled[0] - started, time.process_time() - started


def warm_up(loop: Loop, longest: int) -> None:
    """Iterate until as many responses end in an iteration as begin."""
    budget = loop.config.rollout.token_budget or longest
    for _ in range(-(-longest // budget)):
        loop.iterate()


def record(found: list[tuple[IterationMetrics, float, float]]) -> dict[str, float]:
    metrics, rollouts, wholes = zip(*found, strict=True)
    return {
        "tokens": mean(one.tokens_sampled for one in metrics),
        "steps_most": max(one.decode_steps for one in metrics),
        "samples": mean(one.samples_trained for one in metrics),
        "stale_share": mean(one.tokens_stale_share for one in metrics),
        "rollout_cpu_s": mean(rollouts),
        "rollout_cpu_s_most": max(rollouts),
        "cpu_s": mean(wholes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--budgets", nargs="+", required=True, help="tokens, or none")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_intermixed_args()
    settings = [*given.settings, f"model.name={given.model}", f"seed={given.seed}"]
    loops = [loop_of(settings, budget) for budget in given.budgets]
    for loop in loops:
        warm_up(loop, loop.config.rollout.max_response_tokens)
    found: list[list[tuple[IterationMetrics, float, float]]] = [[] for _ in loops]
    lengths: list[int] = []
    for _ in range(ITERATIONS):
        for loop, some in zip(loops, found, strict=True):
            some.append(iterate(loop))
            if loop.config.rollout.token_budget is None:
                groups = loop.latest.groups
                lengths += [one.response_length for g in groups for one in g.trajectories]
    for loop in loops:
        loop.close()
    given.folder.mkdir(parents=True, exist_ok=True)
    summary = {"loops": [record(some) for some in found], "lengths": lengths}
    (given.folder / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
