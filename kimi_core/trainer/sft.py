"""Supervised fine-tuning on packed sequences (section 2.2)."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from kimi_core.config import SftConfig, ShortestConfig, TrainerConfig
from kimi_core.trainer.fitting import Fitting
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
    key: str = "sft",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fit the responses, given their prompts; the model is updated in place.

    Each example comes once before any comes a second time, in random order unless
    ``config.shuffle`` is off.

    Args:
        model: any causal LM; its parameters that require a gradient are trained. It is put into
            eval mode: a layer that is recomputed must not drop other activations.
        examples: at least one; prompt and response have at least one token each.
        config: steps, batch size and learning rate.
        trainer: ``tokens_per_micro_batch``, ``memory_gb``, ``head_chunk``, ``grad_clip`` and
            ``weight_decay``.
        seed: decides the order of the examples.
        key: where ``config`` stands in the settings, for errors.
        report: called with the number of each step, starting at 1, and its mean loss in nats per
            token.

    Raises:
        ValueError: there are no examples.
        TrainingDiverged: a loss or gradient is not finite; that step is not taken.
    """
    if not examples:
        raise ValueError("SFT needs at least one example; the file or source gave none")
    fitting = Fitting(model, trainer)

    def accumulate(chosen: list[int]) -> float:
        """Add the gradient of the mean negative log-prob of the responses' tokens."""
        batch = pack_examples([examples[index] for index in chosen])
        total = 0.0
        for micro in fitting.micro_batches(batch):
            loss = -fitting.policy.logprobs(micro).sum() / int(batch.mask.sum())
            fitting.backward(loss)
            total += float(loss.detach())
        return total

    shuffle = not isinstance(config, SftConfig) or config.shuffle
    fitting.descend(
        accumulate, len(examples), config, key=key, seed=seed, report=report, shuffle=shuffle
    )


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
