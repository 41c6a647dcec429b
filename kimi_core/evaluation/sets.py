"""Named evaluation sets: their prompts, and one evaluation of all of them.

An evaluation is one line of ``metrics.jsonl``: the held-out prompts, with the numbers of the other
sets inside. It is there as a whole or not at all, so what a run decides by it (the best checkpoint,
an early end) is decided alike after a crash.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_core.config import Config
from kimi_core.evaluation.benchmarks import BENCHMARKS, files_of, load_benchmark, reward_of
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.evaluation.progress import Progress
from kimi_core.metrics import EvaluationMetrics
from kimi_core.prompts.load import load_prompts
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.base import RewardFunction
from kimi_core.types import Prompt


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts of a set, as the model is asked them."""

    prompts: list[Prompt]
    benchmark: str = ""
    """The benchmark whose reward judges; empty: the run's reward does."""

    def reward(self, config: Config) -> RewardFunction | None:
        """A benchmark's reward function; None: the run's. Raises ValueError: it cannot work."""
        return reward_of(self.benchmark, config.reward) if self.benchmark else None


def benchmark_in(source: str) -> tuple[str, list[Path]] | None:
    """The benchmark and the files of a source such as ``gsm8k:test.jsonl``; None: it is none.

    Raises:
        ValueError: a benchmark has no such file.
    """
    name, colon, path = source.partition(":")
    if not colon or name not in BENCHMARKS:
        return None
    return name, files_of(name, Path(path) if path else None)


def load_sets(config: Config) -> dict[str, EvaluationSet]:
    """The sets of ``config.evaluation`` by name.

    Raises:
        ValueError: a source is unknown, missing or malformed; the message names the set.
    """
    return {name: _load(config, name) for name in config.evaluation.sets}


def _load(config: Config, name: str) -> EvaluationSet:
    settings = config.evaluation.sets[name]
    try:
        if found := benchmark_in(settings.source):
            prompts = chat_prompts(load_benchmark(*found), config.prompts)
            return EvaluationSet(prompts[: settings.prompts], found[0])
        told = settings.model_dump(include={"source", "fields", "template", "split"})
        prompts = list(load_prompts(config.prompts.model_copy(update=told)))
        return EvaluationSet(prompts[: settings.prompts])
    except ValueError as error:
        raise ValueError(f"evaluation.sets.{name}: {error}") from error


def evaluate(
    held_out: Evaluator,
    sets: Mapping[str, Evaluator],
    *,
    iteration: int,
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> EvaluationMetrics:
    """Evaluate the first ``limit`` held-out prompts, and all of every other set.

    Raises: as ``Evaluator.evaluate``.
    """
    found = held_out.evaluate(iteration=iteration, seed=seed, limit=limit, progress=progress)
    others = {
        name: one.evaluate(iteration=iteration, seed=seed, progress=progress)
        for name, one in sets.items()
    }
    return replace(
        found,
        wall_s=found.wall_s + sum(one.wall_s for one in others.values()),
        sets={name: one.as_set() for name, one in others.items()},
    )
