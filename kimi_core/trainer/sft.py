"""Supervised fine-tuning on packed sequences (section 2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kimi_core.config import SftConfig, ShortestConfig, TrainerConfig
from kimi_core.models.processors import Pixels
from kimi_core.models.vision import Images
from kimi_core.trainer.fitting import Fitting, Save
from kimi_core.trainer.ranks import Ranks, on_all_ranks
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import PROMPT_VERSION, Batch

Example = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt and of its response, int32."""


def train_sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: SftConfig | ShortestConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    images: Images | None = None,
    key: str = "sft",
    report: Callable[[int, float], None] = lambda step, loss: None,
    after_step: Callable[[int, Save], None] = lambda step, save: None,
    resume: tuple[int, Path] | None = None,
) -> None:
    """Fit the responses, given their prompts; the model is updated in place.

    Each example comes once before any comes a second time, in random order unless
    ``config.shuffle`` is off.

    Args:
        model: any causal LM; its parameters that require a gradient are trained. It is put into
            eval mode: a layer that is recomputed must not drop other activations.
        examples: at least one; prompt and response have at least one token each.
        config: steps, batch size, order and learning rate.
        trainer: ``tokens_per_micro_batch``, ``memory_gb``, ``head_chunk``, ``grad_clip`` and
            ``weight_decay``.
        seed: decides the order of the examples.
        images: those of the examples, if they have some.
        key: where ``config`` stands in the settings, for errors.
        report: called with the number of each step, starting at 1, and its mean loss in nats per
            token.
        after_step, resume: as for ``Fitting.descend``.

    Raises:
        ValueError: there are no examples.
        TrainingDiverged: a loss or gradient is not finite; that step is not taken.
    """
    if not examples:
        raise ValueError("SFT needs at least one example; the file or source gave none")
    fitting = Fitting.of(model, trainer, images)
    fitting.descend(
        _accumulator(fitting, examples),
        len(examples),
        config,
        key=key,
        seed=seed,
        report=report,
        after_step=after_step,
        resume=resume,
    )


@dataclass
class SftPhase:
    """``train_sft`` with the policy of a run's trainer, on all of its ranks; each rank has one."""

    trainer: Trainer
    config: SftConfig | ShortestConfig
    settings: TrainerConfig
    report: Callable[[int, float], None] = lambda step, loss: None
    after_step: Callable[[int, Save], None] = lambda step, save: None
    resume: tuple[int, Path] | None = None
    key: str = "sft"

    @property
    def ranks(self) -> Ranks:
        return self.trainer.ranks

    def fit(self, examples: Sequence[Example], seed: int) -> None:
        """Fit the responses, given their prompts. Rank 0 alone has the examples, and deals them.

        Raises: as ``train_sft``, and RankFailed.
        """
        if not examples:
            raise ValueError("SFT needs at least one example; the file or source gave none")
        mine = self.ranks.of_rank_0(examples, [])
        self._fit(mine, len(examples), self.config, self.key, seed, self.resume)

    @on_all_ranks
    def _fit(
        self,
        examples: Any,
        count: int,
        config: SftConfig | ShortestConfig,
        key: str,
        seed: int,
        resume: tuple[int, Path] | None,
    ) -> None:
        policy = self.trainer.policy
        with policy.at_temperature(1.0):
            fitting = Fitting(policy, self.trainer.recompute, self.settings, self.ranks)
            fitting.descend(
                _accumulator(fitting, examples),
                count,
                config,
                key=key,
                seed=seed,
                report=self.report,
                after_step=self.after_step,
                resume=resume,
            )


def _accumulator(fitting: Fitting, examples: Sequence[Example]) -> Callable[[list[int]], float]:
    """The ``accumulate`` of ``Fitting.descend``; ``examples`` are looked at on rank 0 only."""

    def dealt(chosen: list[int]) -> list[tuple[Batch, int, dict[int, Pixels]]]:
        some = [examples[index] for index in chosen]
        counted = sum(len(response) for _, response in some)
        hands = fitting.deal(some, lambda one: len(one[0]) + len(one[1]))
        packed = [pack_examples(hand) for hand in hands]
        return [(batch, counted, fitting.images_in(batch)) for batch in packed]

    def accumulate(chosen: list[int]) -> float:
        """Add the gradient of the mean negative log-prob of the responses' tokens; return the mean.

        Raises: as ``Fitting.logprobs``; the gradient is then not whole.
        """
        ranks, total = fitting.ranks, 0.0
        batch, counted, sent = ranks.own(ranks.each(dealt(chosen)) if ranks.rank == 0 else None)
        fitting.policy.take_images(sent)
        for micro in fitting.micro_batches(batch):
            found = fitting.logprobs(micro)
            loss = found if micro is None else -found.sum() / counted
            fitting.backward(loss)
            total += float(loss.detach())
        return float(ranks.data_sum(total))

    return accumulate


def pack_examples(examples: Sequence[Example]) -> Batch:
    """Pack prompts and responses end to end; the mask is 1 on responses."""
    tokens = [np.concatenate(example) for example in examples]
    kinds = np.array([0, 1], np.uint8)
    mask = [kinds.repeat([len(prompt), len(response)]) for prompt, response in examples]
    total = sum(map(len, tokens))
    return Batch(
        token_ids=np.concatenate([np.empty(0, np.int32), *tokens]),
        logprobs=np.zeros(total, np.float32),
        mask=np.concatenate([np.empty(0, np.uint8), *mask]),
        policy_versions=np.full(total, PROMPT_VERSION, np.int32),
        cu_seqlens=np.cumsum([0, *map(len, tokens)], dtype=np.int32),
    )
