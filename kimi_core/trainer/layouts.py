"""In which layouts a micro-batch gives each sequence the log-probs that it has alone."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.models.packed_attention import use_packed_attention
from kimi_core.trainer.packing import Layout, MicroBatch, micro_batches
from kimi_core.types import Batch

Logprobs = Callable[[MicroBatch], Tensor]
"""Log-probs of the wanted tokens."""

log = logging.getLogger(__name__)


@torch.no_grad()
def layouts_of(
    model: PreTrainedModel, logprobs: Logprobs, length: int, *, masks_too: bool
) -> list[Layout]:
    """The best layout in which sequences have the log-probs that each has alone.

    Args:
        logprobs: of the policy with that model.
        length: of the longest sequence to try, in tokens.
        masks_too: if that is ``end_to_end``, try ``rows`` as well, and return both if it is
            right.

    Raises:
        ValueError: they differ even if each sequence has a row.
    """
    weight = model.get_output_embeddings().weight
    batch, wanted = _made_up(model, length)
    lengths, edges = batch.lengths, batch.cu_seqlens

    def logprobs_in(max_tokens: int, layout: Layout) -> np.ndarray:
        found_t, which = np.zeros(len(wanted)), range(len(batch))
        for micro in micro_batches(
            batch, wanted, which, max_tokens=max_tokens, layout=layout, device=weight.device
        ):
            found_t[micro.source_t.cpu().numpy()] = logprobs(micro).double().cpu().numpy()
        return found_t

    was_training = model.training
    model.eval()
    # All in one micro-batch: a rope may follow the longest sequence of a batch.
    together = len(lengths) * int(lengths[0])
    right: list[Layout] = []
    try:
        alone = logprobs_in(1, "alone")
        for layout in _layouts(model):
            if right and not (masks_too and layout == "rows"):
                break
            try:
                found = logprobs_in(together, layout)
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                if layout != "end_to_end" and not right:
                    raise
                log.debug("%s, layout %s: %s", type(model).__name__, layout, error)
                continue
            gap = np.abs(found - alone)
            if weight.dtype in (torch.float32, torch.float64):
                same = gap.max() <= 3e-5 * (1 + np.abs(alone).max())
            else:
                # Means of sequences: in bfloat16 SmolLM2 has 0.05 of 14.5 nats by rounding.
                gap_n = np.add.reduceat(gap, edges[:-1]) / (lengths - 1)
                same = gap_n.max() <= 0.02 * (1 + np.abs(alone[wanted]).mean())
            if same:
                right.append(layout)
    finally:
        model.train(was_training)
    if right:
        return right
    raise ValueError(
        f"Cannot train {type(model).__name__}: its log-probs of a sequence change by up "
        f"to {gap.max():.3g} nats with what else is in the batch; take a causal model (Llama, "
        "Qwen, Mistral, GPT-2, Gemma and the like)"
    )


def _made_up(model: PreTrainedModel, length: int) -> tuple[Batch, np.ndarray]:
    """Four sequences, the longest first, and which of their tokens are wanted."""
    # The longest fills a row. The next crosses as much, and shares its row with the others.
    text = model.config.get_text_config()
    longest = min(length + 8, getattr(text, "max_position_embeddings", None) or length + 8)
    lengths = [longest, longest - 8, 5, 3]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    tokens = rng.integers(min(3, vocabulary - 1), vocabulary, sum(lengths)).astype(np.int32)
    edges = np.cumsum([0, *lengths]).astype(np.int32)
    blank = np.zeros(len(tokens), np.float32)
    wanted = np.ones(len(tokens), bool)
    wanted[edges[:-1]] = False
    return Batch(tokens, blank, blank.astype(np.uint8), blank.astype(np.int32), edges), wanted


def _layouts(model: PreTrainedModel) -> list[Layout]:
    told: list[Layout] = ["end_to_end"] if use_packed_attention(model) else []
    return [*told, "rows", "alone"]
