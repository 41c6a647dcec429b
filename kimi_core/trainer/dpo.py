"""Direct preference optimisation (arXiv 2305.18290) on packed pairs, for long2short (section 2.4).

For a chosen response c and a rejected one r to the same prompt,

    loss = −log σ( β·[(log π(c) − log π_ref(c)) − (log π(r) − log π_ref(r))] )

with log-probs summed over each response. The reference is the starting policy. Its log-probs are
computed once, before the first step, so no second model is ever in memory.

The loss couples the two responses of a pair, and they may lie in different micro-batches. A step
therefore takes a pass without gradients for the summed log-probs of all responses. The derivative
of the loss with respect to each of these sums is then known, and a second pass goes through the
micro-batches one by one.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from kimi_core.config import DpoConfig, TrainerConfig
from kimi_core.trainer.fitting import Fitting
from kimi_core.trainer.sft import Example, pack_examples

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids of a prompt, of the chosen and of the rejected response, int32, not empty."""


def train_dpo(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    config: DpoConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    key: str = "dpo",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Make chosen responses likelier than rejected ones; the model is updated in place.

    Args: as ``train_sft``, with ``pairs`` in place of examples. Losses are means over pairs.

    Raises:
        ValueError: there are no pairs.
        TrainingDiverged: a loss or gradient is not finite; that step is not taken.
    """
    if not pairs:
        raise ValueError("DPO needs at least one pair of a chosen and a rejected response")
    fitting = Fitting.of(model, trainer)
    reference_n2 = torch.cat([_sums(fitting, some) for some in _chunks(pairs, config.batch_size)])

    def accumulate(chosen: list[int]) -> float:
        some = [pairs[index] for index in chosen]
        losses_n, slopes_n2 = dpo_loss(_sums(fitting, some), reference_n2[chosen], config.beta)
        slopes = (slopes_n2 / len(some)).flatten()
        for micro in fitting.micro_batches(pack_examples(_examples(some)), share_prompts=True):
            assert micro is not None  # There is one rank.
            logprobs_t = fitting.policy.logprobs(micro)
            fitting.backward((logprobs_t * slopes[micro.sequence_t]).sum())
        return float(losses_n.mean())

    fitting.descend(accumulate, len(pairs), config, key=key, seed=seed, report=report)


def dpo_loss(sums_n2: Tensor, reference_n2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of each pair and its derivative.

    Args:
        sums_n2: summed log-probs of the chosen and of the rejected response, float64 ``[n, 2]``.
        reference_n2: the same of the reference policy.
        beta: strength of the pull towards the reference, above 0.

    Returns:
        Losses, float64 ``[n]``, and their derivatives with respect to ``sums_n2``, ``[n, 2]``.
    """
    gain_n2 = sums_n2 - reference_n2
    logits_n = beta * (gain_n2[:, 0] - gain_n2[:, 1])
    slope_n = beta * torch.sigmoid(-logits_n)
    return -logsigmoid(logits_n), torch.stack([-slope_n, slope_n], dim=1)


@torch.no_grad()
def _sums(fitting: Fitting, pairs: Sequence[Pair]) -> Tensor:
    """Log-probs of both responses of each pair, summed in float64, ``[n, 2]``."""
    total = torch.zeros(2 * len(pairs), dtype=torch.float64, device=fitting.policy.model.device)
    for micro in fitting.micro_batches(pack_examples(_examples(pairs)), share_prompts=True):
        assert micro is not None
        total.index_add_(0, micro.sequence_t, fitting.policy.logprobs(micro).double())
    return total.view(-1, 2)


def _examples(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected responses in turn, each behind its prompt."""
    return [(prompt, one) for prompt, *both in pairs for one in both]


def _chunks(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
