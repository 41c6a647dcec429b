"""The tables of docs/log.md, run again from nothing.

    python benches/experiments.py think                  # the default run
    python benches/experiments.py smollm2                # the pretrained model
    python benches/experiments.py objectives             # omd, reinforce, grpo, rest (sum and mean)
    python benches/experiments.py partial                # token budgets, and when to train
    python benches/experiments.py length                 # the length reward on and off
    python benches/experiments.py partial --seeds 0 1 2 3 --jobs 1

Every run is one process of ``train.py`` with one thread; a run that has its summary is not run
again. Tables are Markdown: mean ± standard deviation over seeds of the last evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from kimi_core.metrics import read_metrics

RUNS = Path("runs/experiments")
LEARNING_RATES = ("3e-5", "1e-4", "3e-4")
OBJECTIVES = {
    "omd": ["trainer.objective=omd"],
    "reinforce": ["trainer.objective=reinforce"],
    "grpo": ["trainer.objective=grpo"],
    "rest, sum": ["trainer.objective=rest", "trainer.ablation.normalize=none"],
    "rest, mean": ["trainer.objective=rest", "trainer.ablation.normalize=length"],
}
BUDGETS = {
    "full": [],
    "budget 24, train as they end": ["rollout.token_budget=24"],
    "budget 24, wait for the group": ["rollout.token_budget=24", "trainer.ablation.release=group"],
    "budget 24, only fresh tokens": ["rollout.token_budget=24", "trainer.max_staleness=0"],
}
LENGTHS = {"off": [], "0.3": ["reward.length_weight=0.3"], "1.0": ["reward.length_weight=1.0"]}


def run(name: str, arguments: list[str], *, driver: str = "train") -> Path:
    """Run a driver to its end, unless it has been; return the run's folder."""
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        command = [sys.executable, f"python/{driver}.py", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        RUNS.mkdir(parents=True, exist_ok=True)
        with (RUNS / f"{name}.log").open("w") as log:
            done = subprocess.run(
                [*command, f"name={name}", f"runs={RUNS}"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=7200,
            )
        if done.returncode:
            raise SystemExit(f"{name} failed: see {RUNS / name}.log")
    return folder


Variants = dict[str, Callable[[int], Path]]
"""One function of the seed for each variant of a set."""


def variants(
    settings: dict[str, list[str]], common: list[str], start: Callable[[int], list[str]]
) -> Variants:
    """A run for each of ``settings``, all from the same start for a seed."""

    def variant(label: str, extra: list[str]) -> Callable[[int], Path]:
        slug = "-".join(label.replace(",", "").split())
        return lambda seed: run(f"{slug}-{seed}", [*common, *extra, *start(seed), f"seed={seed}"])

    return {label: variant(label, extra) for label, extra in settings.items()}


def mixed_start(seed: int) -> list[str]:
    """The SFT start of the default run."""
    folder = run(f"start-{seed}", [f"seed={seed}"], driver="sft")
    return [f"model.name={folder}/checkpoint", "sft.data=none"]


ROOM = ["rollout.max_response_tokens=144", "model.scratch.context=160", "rollout.repeat_count=5"]
"""The styles of ``multiply_lengths`` need more room than the default run has, and one of them says
the same three times over."""


def lengths_start(seed: int) -> list[str]:
    """A start that gives right answers at four lengths."""
    arguments = [f"seed={seed}", "sft.data=multiply_lengths", *ROOM]
    folder = run(f"start-lengths-{seed}", arguments, driver="sft")
    return [f"model.name={folder}/checkpoint", "sft.data=none"]


def whole(config: str) -> Variants:
    """A config as it ships, SFT included."""
    stem = Path(config).stem
    return {stem: lambda seed: run(f"{stem}-{seed}", [config, f"seed={seed}"])}


def objectives() -> Variants:
    settings = {
        f"{label} at {rate}": [*extra, f"trainer.learning_rate={rate}"]
        for label, extra in OBJECTIVES.items()
        for rate in LEARNING_RATES
    }
    return variants(settings, ["iterations=40", "evaluation.every=40"], mixed_start)


def length() -> Variants:
    settings = {f"length reward {label}": extra for label, extra in LENGTHS.items()}
    return variants(settings, ["iterations=20", "evaluation.every=20", *ROOM], lengths_start)


def partial() -> Variants:
    common = ["samples=10240", "iterations=200", "evaluation.every=20"]
    return variants(BUDGETS, common, mixed_start)


def table(rows: dict[str, list[Path]]) -> str:
    """Start, end and cost of each variant, mean ± standard deviation over its seeds."""
    lines = [
        "| | greedy before | sampled before | greedy | sampled | length before | length "
        "| samples | CPU ms a sample | steps an iteration, most | stale tokens |",
        "|---" * 11 + "|",
    ]
    for label, folders in rows.items():
        columns = zip(*(measure(folder) for folder in folders), strict=True)
        cells = [f"{mean(c):.3g} ± {stdev(c) if len(c) > 1 else 0:.2g}" for c in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(folder: Path) -> list[float]:
    summary = json.loads((folder / "summary.json").read_text())
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    iterations, _ = read_metrics(folder / "metrics.jsonl")
    trained = sum(m.samples_trained for m in iterations)
    stale = [m.tokens_stale_share for m in iterations if m.samples_trained]
    return [
        first["accuracy_greedy"],
        first["accuracy_sampled"],
        last["accuracy_greedy"],
        last["accuracy_sampled"],
        first["length_mean"],
        last["length_mean"],
        trained,
        1000 * sum(m.cpu_s for m in iterations) / max(1, trained),
        max(m.decode_steps for m in iterations),
        mean(stale),
    ]


def main() -> None:
    sets = {
        "think": lambda: whole("configs/think.toml"),
        "smollm2": lambda: whole("configs/smollm2.toml"),
        "objectives": objectives,
        "partial": partial,
        "length": length,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=sets)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    chosen = sets[given.set]()
    starts = {"objectives": mixed_start, "partial": mixed_start, "length": lengths_start}
    if given.set in starts:  # Before the rest: two variants must not both make one.
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(starts[given.set], given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {
            label: [pool.submit(variant, seed) for seed in given.seeds]
            for label, variant in chosen.items()
        }
        print(table({label: [one.result() for one in row] for label, row in running.items()}))


if __name__ == "__main__":
    main()
