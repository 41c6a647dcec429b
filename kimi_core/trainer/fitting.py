"""What SFT and DPO share: steps over examples, in micro-batches that fit the memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.config import (
    DpoConfig,
    SftConfig,
    SftScheduleConfig,
    ShortestConfig,
    TrainerConfig,
)
from kimi_core.models.processors import Pixels
from kimi_core.models.vision import Images, to_send_with
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.master_weights import MasterWeights, local
from kimi_core.trainer.packing import MicroBatch, micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, deal
from kimi_core.trainer.schedule import share_of_peak
from kimi_core.trainer.trainer import TrainingDiverged
from kimi_core.types import Batch
from kimi_core.weights.shards import load_rows, save_rows

Save = Callable[[Path], None]
"""Writes masters and moments into a folder."""

TENSORS = "sft.safetensors"

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, besides the number of its steps."""

LEAVE = "leave"
"""What rank 0 tells the others when it ends a training between two steps."""

T = TypeVar("T")


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
        self._weights = MasterWeights(policy.trainable(), self.ranks)
        self._recompute = recompute
        self._max_tokens = recompute.most_tokens(trainer.tokens_per_micro_batch, policy.probe)

    @classmethod
    def of(
        cls, model: PreTrainedModel, trainer: TrainerConfig, images: Images | None = None
    ) -> Self:
        """The same for a model in this process alone.

        Args:
            model: any causal LM; its parameters that require a gradient are trained. It is put into
                eval mode: a layer that is recomputed must not drop other activations.
            trainer: ``memory_gb`` and ``head_chunk`` are read, too.
            images: those of the examples, if they have some.
        """
        chunk = trainer.head_chunk
        policy = Policy(model, temperature=1.0, head_chunk=chunk, images=images).eval()
        return cls(policy, Recompute(model, trainer.memory_gb), trainer)

    def micro_batches(
        self, batch: Batch, *, share_prompts: bool = False
    ) -> Iterator[MicroBatch | None]:
        """This rank's ``batch`` in passes that fit the memory; None: an empty pass, because another
        rank has more. The masked tokens are wanted.

        Args:
            share_prompts: lay a prompt once for all its responses, if the model can take it.
        """
        mine = micro_batches(
            batch,
            batch.mask > 0,
            np.arange(len(batch)),
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

    def deal(self, items: Sequence[T], size: Callable[[T], int]) -> list[list[T]]:
        """Deal ``items`` by their sizes, one list for each data-parallel group of ranks."""
        hands = deal([size(item) for item in items], self.ranks.data_parallel)
        return [[items[index] for index in hand] for hand in hands]

    def images_in(self, batch: Batch) -> dict[int, Pixels]:
        """Pixels of the images in a batch that another rank is to get; none with one rank."""
        if self.ranks.size == 1:
            return {}
        return to_send_with(self.policy.images, batch.token_ids)

    def logprobs(self, micro: MicroBatch | None) -> Tensor:
        """Log-probs of a pass's wanted tokens, float32 ``[t]``; 0 for an empty pass.

        Raises:
            FloatingPointError: a rank has met a NaN; all ranks raise it, and it names the rank.
        """
        found, fault = None, ""
        try:
            found = self.policy.nothing() if micro is None else self.policy.logprobs(micro)
        except FloatingPointError as error:
            fault = str(error)
        said = self.ranks.fault(fault)  # Before ``backward``, where the others would wait.
        if said or found is None:
            raise FloatingPointError(said)
        return found

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, which is summed over the ranks."""
        (loss * self.policy.averaged_over).backward()
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
                returns that loss, the same on every rank.
            count: number of examples, at least 1.
            key: where ``config`` stands in the settings, for errors.
            seed: decides the order of the examples.
            report: called with the number of each step, starting at 1, and its mean loss.
            after_step: called with the number of each step and a function that saves its state; on
                rank 0. The other ranks then write their part.
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
                norm = self._weights.clip_gradients(self._trainer.grad_clip)
                fault = f"loss {loss}, gradient norm {norm}"
            except FloatingPointError as error:  # A log-prob is NaN, so the loss is NaN too.
                loss, norm, fault = math.nan, math.nan, f"loss nan: {error}"
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingDiverged(
                    f"{key}, step {step}: {fault}; the step was not "
                    f"taken. Lower {key}.learning_rate (now {config.learning_rate})"
                )
            self._weights.step(optimizer)
            report(step, loss)
            if not self._after(optimizer, partial(after_step, step)):
                return

    def _after(self, optimizer: torch.optim.Optimizer, after_step: Callable[[Save], None]) -> bool:
        """Call ``after_step`` on rank 0, and save with it; False on the others if rank 0 leaves."""
        if self.ranks.rank > 0:
            where = self.ranks.everywhere(None)
            if isinstance(where, Path):
                self._save(optimizer, where)
            return where != LEAVE
        told = False

        def save(folder: Path) -> None:
            nonlocal told
            told = True
            self.ranks.everywhere(folder)
            self._save(optimizer, folder)

        leaves = True
        try:
            after_step(save)
            leaves = False
        finally:
            if not told:
                self.ranks.everywhere(LEAVE if leaves else None)
        return True

    def _save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Write masters and moments; all ranks call this."""
        tensors = {}
        for name, master in self._weights.masters.items():
            tensors[name] = master
            tensors |= {f"{name}/{key}": value for key, value in optimizer.state[master].items()}
        save_rows(tensors, folder / TENSORS, self.ranks)

    def _load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        masters = self._weights.masters
        moments = {f"{name}/{key}": one for name, one in masters.items() for key in MOMENTS}
        saved = load_rows(folder / TENSORS, masters | moments, self.ranks)
        self._weights.load(saved)
        for name, master in masters.items():
            if f"{name}/step" not in saved:  # It has not had a gradient.
                continue
            state = optimizer.state[master]
            state["step"] = saved[f"{name}/step"].to(master.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master)
                local(state[key]).copy_(saved[f"{name}/{key}"])


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
