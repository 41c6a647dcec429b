"""The sets of runs whose tables stand in docs/log.md: mean ± standard deviation over seeds."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from figures.runs import Runs
from kimi_core.metrics import read_metrics

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


def whole(config: str) -> Callable[[Runs], str]:
    """A config as it ships, SFT included."""

    def make(runs: Runs) -> str:
        folders = runs.each(lambda seed: runs.train(f"{config}-{seed}", config, f"seed={seed}"))
        return table({config: folders})

    return make


def objectives(runs: Runs) -> str:
    settings = {
        f"{label} at {rate}": [*extra, f"trainer.learning_rate={rate}"]
        for label, extra in OBJECTIVES.items()
        for rate in LEARNING_RATES
    }
    return table(_variants(runs, settings, ["iterations=40", "evaluation.every=40"]))


def partial(runs: Runs) -> str:
    common = ["samples=10240", "iterations=200", "evaluation.every=20"]
    return table(_variants(runs, BUDGETS, common))


TABLES: dict[str, Callable[[Runs], str]] = {
    "think": whole("think"),
    "smollm2": whole("smollm2"),
    "objectives": objectives,
    "partial": partial,
}


def _variants(
    runs: Runs, settings: dict[str, list[str]], common: list[str]
) -> dict[str, list[Path]]:
    """A run for each of ``settings`` and each seed, from the SFT start of the default run."""
    starts = dict(
        zip(
            runs.seeds,
            runs.each(lambda seed: runs.sft(f"start-{seed}", "think", f"seed={seed}")),
            strict=True,
        )
    )

    def variant(label: str, seed: int) -> Path:
        slug = "-".join(label.replace(",", "").split())
        start = [f"model.name={starts[seed]}/checkpoint", "sft.data=none", f"seed={seed}"]
        return runs.train(f"{slug}-{seed}", "think", *common, *settings[label], *start)

    return {label: runs.each(lambda seed, label=label: variant(label, seed)) for label in settings}


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
