"""What SFT and DPO share: steps over examples, in micro-batches that fit the memory."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.config import DpoConfig, SftConfig, ShortestConfig, TrainerConfig
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.packing import MicroBatch, micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import TrainingDiverged
from kimi_core.types import Batch


class Fitting:
    """A model that is fitted to examples, in place.

    Args:
        model: any causal LM; its parameters that require a gradient are trained. It is put into
            eval mode: a layer that is recomputed must not drop other activations.
        trainer: ``tokens_per_micro_batch``, ``memory_gb``, ``head_chunk``, ``grad_clip`` and
            ``weight_decay`` are read.
    """

    def __init__(self, model: PreTrainedModel, trainer: TrainerConfig) -> None:
        self.policy = Policy(model, temperature=1.0, head_chunk=trainer.head_chunk).eval()
        self._trainer = trainer
        self._weights = MasterWeights(self.policy.trainable())
        self._recompute = Recompute(model, trainer.memory_gb)
        self._max_tokens = self._recompute.most_tokens(
            trainer.tokens_per_micro_batch, self.policy.probe
        )

    def micro_batches(self, batch: Batch, *, share_prompts: bool = False) -> Iterator[MicroBatch]:
        """The sequences of ``batch`` in passes that fit the memory; the masked tokens are wanted.

        Args:
            share_prompts: lay a prompt once for all its responses, if the model can take it.
        """
        for micro in micro_batches(
            batch,
            batch.mask > 0,
            range(len(batch)),
            max_tokens=self._max_tokens,
            share_prompts=share_prompts and self.policy.shares_prompts,
            layout=self.policy.layout,
            masks_up_to=self.policy.masks_up_to,
            device=self.policy.model.device,
        ):
            self._recompute.fit(micro.ids_rl.numel())
            yield micro

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        loss.backward()
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
        shuffle: bool = True,
    ) -> None:
        """Take ``config.steps`` steps of AdamW.

        Each example comes once before any comes a second time.

        Args:
            accumulate: adds the gradient of the mean loss of some examples by ``backward``, and
                returns that loss.
            count: number of examples, at least 1.
            key: where ``config`` stands in the settings, for errors.
            seed: decides the order of the examples.
            report: called with the number of each step, starting at 1, and its mean loss.
            shuffle: False takes the examples in the order in which they are given.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; that step is not taken.
        """
        optimizer = self._weights.adamw(config.learning_rate, self._trainer.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, config.steps)
        )
        rng = np.random.default_rng([seed, config.steps])
        order: list[int] = []
        for step in range(1, config.steps + 1):
            while len(order) < config.batch_size:
                order.extend(rng.permutation(count).tolist() if shuffle else range(count))
            chosen, order = order[: config.batch_size], order[config.batch_size :]
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
            schedule.step()
            report(step, loss)


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: it rises over the first 5 % of the steps, then falls to 0.1."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
