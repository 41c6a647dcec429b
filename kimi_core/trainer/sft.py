"""Supervised fine-tuning on packed sequences (section 2.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from kimi_core.config import SftConfig, TrainerConfig
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, on_all_ranks
from kimi_core.trainer.trainer import Trainer, TrainingDiverged
from kimi_core.types import PROMPT_VERSION, Batch

Example = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt and of its response, int32."""


def train_sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: SftConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fit the responses, given their prompts; the model is updated in place.

    Examples come in random order, and each comes once before any comes a second time.

    Args:
        model: any causal LM; its parameters that require a gradient are trained. It is put into
            eval mode: a layer that is recomputed must not drop other activations.
        examples: at least one; prompt and response have at least one token each.
        config: steps, batch size and learning rate.
        trainer: ``tokens_per_micro_batch``, ``memory_gb``, ``head_chunk``, ``grad_clip`` and
            ``weight_decay``.
        seed: decides the order of the examples.
        report: called with the number of each step, starting at 1, and its mean loss in nats per
            token.

    Raises:
        ValueError: there are no examples.
        TrainingDiverged: a loss or gradient is not finite; that step is not taken.
    """
    if not examples:
        raise ValueError("SFT needs at least one example; the file or source gave none")
    policy = Policy(model, temperature=1.0, head_chunk=trainer.head_chunk).eval()
    recompute = Recompute(model, trainer.memory_gb)
    _fit(policy, recompute, Ranks(), examples, config, trainer, seed, report)


@dataclass
class SftPhase:
    """``train_sft`` with the policy of a run's trainer, on all of its ranks; each rank has one."""

    trainer: Trainer
    config: SftConfig
    settings: TrainerConfig
    report: Callable[[int, float], None] = lambda step, loss: None

    @property
    def ranks(self) -> Ranks:
        return self.trainer.ranks

    @on_all_ranks
    def fit(self, examples: Sequence[Example], seed: int) -> None:
        """Fit the responses, given their prompts.

        Raises: as ``train_sft``, and RankFailed.
        """
        policy, recompute = self.trainer.policy, self.trainer.recompute
        with policy.at_temperature(1.0):
            _fit(
                policy,
                recompute,
                self.ranks,
                examples,
                self.config,
                self.settings,
                seed,
                self.report,
            )


def _fit(
    policy: Policy,
    recompute: Recompute,
    ranks: Ranks,
    examples: Sequence[Example],
    config: SftConfig,
    trainer: TrainerConfig,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    weights = MasterWeights(policy.trainable())
    max_tokens = recompute.most_tokens(trainer.tokens_per_micro_batch, policy.probe)
    optimizer = weights.adamw(config.learning_rate, trainer.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, config.steps)
    )
    rng = np.random.default_rng([seed, config.steps])
    order: list[int] = []
    for step in range(1, config.steps + 1):
        while len(order) < config.batch_size:
            order.extend(rng.permutation(len(examples)).tolist())
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        batch = pack_examples([examples[index] for index in chosen])
        loss = _accumulate(policy, weights, recompute, ranks, batch, max_tokens)
        norm = weights.clip_gradients(trainer.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"SFT step {step}: loss {loss}, gradient norm {norm}; the step was not "
                f"taken. Lower sft.learning_rate (now {config.learning_rate})"
            )
        weights.step(optimizer)
        schedule.step()
        report(step, loss)


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: it rises over the first 5 % of the steps, then falls to 0.1."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pack_examples(examples: Sequence[Example]) -> Batch:
    """Pack prompts and responses end to end; the mask is 1 on responses."""
    tokens = [np.concatenate(example) for example in examples]
    mask = [np.repeat([0, 1], [len(prompt), len(response)]) for prompt, response in examples]
    total = sum(map(len, tokens))
    return Batch(
        token_ids=np.concatenate(tokens).astype(np.int32),
        logprobs=np.zeros(total, np.float32),
        mask=np.concatenate(mask).astype(np.uint8),
        policy_versions=np.full(total, PROMPT_VERSION, np.int32),
        cu_seqlens=np.cumsum([0, *map(len, tokens)], dtype=np.int32),
    )


def _accumulate(
    policy: Policy,
    weights: MasterWeights,
    recompute: Recompute,
    ranks: Ranks,
    batch: Batch,
    max_tokens: int,
) -> float:
    """Add the gradient of the mean negative log-prob of the responses' tokens; return the mean.

    It is NaN if a log-prob is NaN; the gradient is then not whole.
    """
    counted = batch.mask > 0
    total = 0.0
    mine = micro_batches(
        batch,
        counted,
        ranks.share(np.arange(len(batch)), batch.lengths),
        max_tokens=max_tokens,
        layout=policy.layout,
        masks_up_to=policy.masks_up_to,
        device=policy.model.device,
    )
    for micro in ranks.passes(mine):
        loss, fault = None, ""
        try:
            if micro is None:
                loss = policy.nothing()
            else:
                recompute.fit(micro.ids_rl.numel())
                loss = -policy.logprobs(micro).sum() / int(counted.sum())
        except FloatingPointError as error:
            fault = str(error)
        if ranks.fault(fault) or loss is None:
            return math.nan
        (loss * ranks.size).backward()
        weights.add_gradients()
        total += float(loss.detach())
    return float(ranks.sum(total))
