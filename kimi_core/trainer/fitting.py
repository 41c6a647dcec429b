"""What SFT and DPO share: steps over examples, in micro-batches that fit the memory."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.config import (
    DpoConfig,
    SftConfig,
    SftScheduleConfig,
    ShortestConfig,
    TrainerConfig,
)
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.packing import MicroBatch, micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks
from kimi_core.trainer.schedule import share_of_peak
from kimi_core.trainer.trainer import TrainingDiverged
from kimi_core.types import Batch

Save = Callable[[Path], None]
"""Writes masters and moments into a folder."""

TENSORS = "sft.safetensors"


class Fitting:
    """A policy that is fitted to examples, in place.

    Args:
        policy: at temperature 1.
        recompute: decides what its passes keep.
        trainer: ``tokens_per_micro_batch``, ``grad_clip`` and ``weight_decay`` are read.
        ranks: the processes that train together; None: this one alone.
    """

    def __init__(
        self,
        policy: Policy,
        recompute: Recompute,
        trainer: TrainerConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.ranks = ranks or Ranks()
        self._trainer = trainer
        self._weights = MasterWeights(policy.trainable())
        self._recompute = recompute
        self._max_tokens = recompute.most_tokens(trainer.tokens_per_micro_batch, policy.probe)

    @classmethod
    def of(cls, model: PreTrainedModel, trainer: TrainerConfig) -> Self:
        """The same for a model in this process alone.

        Args:
            model: any causal LM; its parameters that require a gradient are trained. It is put into
                eval mode: a layer that is recomputed must not drop other activations.
            trainer: ``memory_gb`` and ``head_chunk`` are read, too.
        """
        policy = Policy(model, temperature=1.0, head_chunk=trainer.head_chunk).eval()
        return cls(policy, Recompute(model, trainer.memory_gb), trainer)

    def micro_batches(
        self, batch: Batch, *, share_prompts: bool = False
    ) -> Iterator[MicroBatch | None]:
        """This rank's sequences of ``batch`` in passes that fit the memory; None: an empty pass,
        because another rank has more. The masked tokens are wanted.

        Args:
            share_prompts: lay a prompt once for all its responses, if the model can take it.
        """
        mine = micro_batches(
            batch,
            batch.mask > 0,
            self.ranks.share(np.arange(len(batch)), batch.lengths),
            max_tokens=self._max_tokens,
            share_prompts=share_prompts and self.policy.shares_prompts,
            layout=self.policy.layout,
            masks_up_to=self.policy.masks_up_to,
            device=self.policy.model.device,
        )
        for micro in self.ranks.passes(mine):
            if micro is not None:
                self._recompute.fit(micro.ids_rl.numel())
            yield micro

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, which is summed over the ranks."""
        (loss * self.ranks.size).backward()
        self._weights.add_gradients()

    def descend(
        self,
        accumulate: Callable[[list[int]], float],
        count: int,
        config: SftConfig | ShortestConfig | DpoConfig,
        *,
        key: str,
        seed: int,
        report: Callable[[int, float], None],
        after_step: Callable[[int, Save], None] = lambda step, save: None,
        resume: tuple[int, Path] | None = None,
    ) -> None:
        """Take ``config.steps`` steps of AdamW.

        Args:
            accumulate: adds the gradient of the mean loss of some examples by ``backward``, and
                returns that loss.
            count: number of examples, at least 1.
            key: where ``config`` stands in the settings, for errors.
            seed: decides the order of the examples.
            report: called with the number of each step, starting at 1, and its mean loss.
            after_step: called with the number of each step and a function that saves its state.
            resume: steps done, and the folder that such a function wrote after them. What follows
                has the bits of a training that was not interrupted.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; that step is not taken.
        """
        optimizer = self._weights.adamw(config.learning_rate, self._trainer.weight_decay)
        schedule = config.schedule if isinstance(config, SftConfig) else SftScheduleConfig()
        done, folder = resume or (0, None)
        if folder is not None:
            self._load(optimizer, folder)
        batches = _batches(count, config, np.random.default_rng([seed, config.steps]))
        for step, chosen in enumerate(islice(batches, done, config.steps), done + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * share_of_peak(schedule, step - 1, config.steps)
            try:
                loss = accumulate(chosen)
            except FloatingPointError:  # A log-prob is NaN, so the loss is NaN too.
                loss = math.nan
            norm = self._weights.clip_gradients(self._trainer.grad_clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingDiverged(
                    f"{key}, step {step}: loss {loss}, gradient norm {norm}; the step was not "
                    f"taken. Lower {key}.learning_rate (now {config.learning_rate})"
                )
            self._weights.step(optimizer)
            report(step, loss)
            after_step(step, lambda folder: self._save(optimizer, folder))

    def _save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        tensors = {}
        for name, master in self._weights.masters.items():
            tensors[name] = master.detach().contiguous()
            tensors |= {f"{name}/{key}": value for key, value in optimizer.state[master].items()}
        save_file(tensors, folder / TENSORS)

    def _load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        saved = load_file(folder / TENSORS)
        self._weights.load(saved)
        for place, value in saved.items():
            name, slash, key = place.partition("/")
            if slash:
                master = self._weights.masters[name]
                optimizer.state[master][key] = value.to(master.device)


def _batches(
    count: int, config: SftConfig | ShortestConfig | DpoConfig, rng: np.random.Generator
) -> Iterator[list[int]]:
    """The examples of each step. Each comes once before any comes a second time."""
    shuffle = not isinstance(config, SftConfig) or config.shuffle
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order.extend(rng.permutation(count).tolist() if shuffle else range(count))
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        yield chosen
