"""What a run computes, counted from its settings and the lengths of its data.

``run/speed.py`` measures what one of each count takes on this machine.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_core.config import Config


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses."""

    prompt: float
    """Mean."""
    response: float
    """Mean."""
    longest: float
    """Of a response: a batch is decoded until its longest response has ended."""


class Work(NamedTuple):
    """Counts of what takes time."""

    steps: float = 0.0
    """Decode steps, each for all rows of a batch."""
    sampled: float = 0.0
    """Tokens that an engine samples."""
    read: float = 0.0
    """Tokens of contexts that an engine reads before it samples."""
    updates: float = 0.0
    """Optimizer steps."""
    trained: float = 0.0
    """Tokens in forward and backward passes, prompts included."""

    def flop(self, parameters: int) -> float:
        """Floating-point operations, without those of attention."""
        return parameters * (2 * (self.sampled + self.read) + 6 * self.trained)


def total(parts: Iterable[tuple[float, Work]]) -> Work:
    """The sum of works, each multiplied by a number."""
    return Work(*np.sum([times * np.array(work) for times, work in parts], axis=0).tolist())


def whole(
    config: Config, lengths: Lengths, example: float, held_out: int, sets: Iterable[tuple[int, int]]
) -> Work:
    """A run with SFT, iterations and evaluations, without the reward function.

    Args:
        example: mean tokens of an SFT example, prompt included; 0: there is no SFT.
        held_out: prompts of the first and of the last evaluation.
        sets: prompts and samples of each other evaluation set.
    """
    iterations = config.iterations
    if config.samples is not None:
        each = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt
        iterations = min(iterations, math.ceil(config.samples / each))
    ends = 2 if iterations else 1
    between = max(0, (iterations - 1) // config.evaluation.every)
    some = min(held_out, config.evaluation.prompts or held_out)
    samples = config.evaluation.samples
    others = [(ends + between, evaluation(config, lengths, *one)) for one in sets]
    return total(
        [
            (bool(example), fine_tuning(config, example)),
            (iterations, iteration(config, lengths)),
            (ends, evaluation(config, lengths, held_out, samples)),
            (between, evaluation(config, lengths, some, samples)),
            *others,
        ]
    )


def fine_tuning(config: Config, example: float) -> Work:
    """The SFT phase; ``example`` as for ``whole``."""
    steps = config.sft.steps
    return Work(updates=steps, trained=steps * config.sft.batch_size * example)


def iteration(config: Config, lengths: Lengths) -> Work:
    """An iteration of a run that has gone on for a while: as many responses end as begin."""
    rollout = config.rollout
    prompts, samples = rollout.prompts_per_iteration, rollout.samples_per_prompt
    budget = min(rollout.token_budget or rollout.max_response_tokens, rollout.max_response_tokens)
    rows = prompts * samples
    parts = math.ceil(lengths.response / budget)
    steps = min(budget, lengths.longest) * math.ceil(rows * parts / _at_once(config))
    again = sum(lengths.prompt + budget * part for part in range(1, parts))
    return Work(
        steps=steps,
        sampled=rows * lengths.response,
        read=prompts * lengths.prompt + rows * again,
        updates=config.trainer.updates_per_iteration,
        trained=prompts * lengths.prompt + rows * lengths.response,
    )


def evaluation(config: Config, lengths: Lengths, prompts: int, samples: int) -> Work:
    """The most likely response to each prompt, and ``samples`` sampled ones."""
    batches = sum(math.ceil(n / config.rollout.batch_rows) for n in (prompts, prompts * samples))
    responses = prompts * (1 + samples)
    return Work(
        steps=batches * lengths.longest,
        sampled=responses * lengths.response,
        read=responses * lengths.prompt,
    )


def _at_once(config: Config) -> int:
    return config.rollout.batch_rows * config.rollout.workers
