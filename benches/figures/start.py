"""The start that Figures 5 and 10 and the length reward share: ``think`` after 250 steps of SFT.

Of its sampled answers 1 to 20 % are right, as the seed has it, and 40 iterations from it do not
reach the ceiling, so that methods can be told apart. ``think`` itself, with 700 steps, ends at 0.96
whatever is done.
"""

from pathlib import Path

from figures.runs import Runs
from figures.seeds import Mean
from kimi_core.metrics import EvaluationMetrics, read_metrics

ITERATIONS = 40
SAMPLES = ITERATIONS * 256
CHEAP = ["trajectories.every=0", "save_every=10"]
"""What does not change a run's numbers, and saves CPU time."""


def start(runs: Runs, seed: int) -> Path:
    """The checkpoint of a seed's start."""
    return runs.sft(f"short-{seed}", "think", "sft.steps=250", f"seed={seed}") / "checkpoint"


def train(runs: Runs, name: str, seed: int, *settings: str, begin: int | None = None) -> Path:
    """40 iterations of RL, 10,240 samples, from the start of that seed, or of seed ``begin``."""
    common = [f"iterations={ITERATIONS}", "evaluation.every=5", *CHEAP]
    model = start(runs, seed if begin is None else begin)
    given = [f"model.name={model}", "sft.data=none", f"seed={seed}"]
    return runs.train(f"{name}-{seed}", "think", *common, *settings, *given)


def plain(runs: Runs, seed: int) -> Path:
    """RL as ``think`` has it: mirror descent, learning rate 1e-4, τ = 0.01, no length reward."""
    return train(runs, "plain", seed)


def evaluations(folder: Path) -> list[EvaluationMetrics]:
    return read_metrics(folder / "metrics.jsonl")[1]


def over_seeds(folders: list[Path], key: str) -> tuple[list[float], list[Mean]]:
    """An evaluated number against iterations: iterations, and a mean at each."""
    found = [evaluations(folder) for folder in folders]
    columns = list(zip(*found, strict=True))
    means = [Mean.of([getattr(one, key) for one in column]) for column in columns]
    return [column[0].iteration for column in columns], means
