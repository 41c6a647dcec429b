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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from kimi_core.config import DpoConfig, TrainerConfig
from kimi_core.trainer.fitting import Fitting
from kimi_core.trainer.ranks import Ranks, on_all_ranks
from kimi_core.trainer.sft import Example, pack_examples
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch

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
    _descend(fitting, pairs, len(pairs), config, seed=seed, key=key, report=report)


@dataclass
class DpoPhase:
    """``train_dpo`` with the policy of a trainer, on all of its ranks; each rank has one."""

    trainer: Trainer
    settings: TrainerConfig
    report: Callable[[int, float], None] = lambda step, loss: None

    @property
    def ranks(self) -> Ranks:
        return self.trainer.ranks

    def fit(self, pairs: Sequence[Pair], config: DpoConfig, seed: int, key: str = "dpo") -> None:
        """Make chosen responses likelier. Rank 0 alone has the pairs, and deals them.

        Raises: as ``train_dpo``, and RankFailed.
        """
        if not pairs:
            raise ValueError("DPO needs at least one pair of a chosen and a rejected response")
        self._fit(self.ranks.of_rank_0(pairs, []), len(pairs), config, seed, key)

    @on_all_ranks
    def _fit(self, pairs: Any, count: int, config: DpoConfig, seed: int, key: str) -> None:
        policy = self.trainer.policy
        with policy.at_temperature(1.0):
            fitting = Fitting(policy, self.trainer.recompute, self.settings, self.ranks)
            _descend(fitting, pairs, count, config, seed=seed, key=key, report=self.report)


def _descend(
    fitting: Fitting,
    pairs: Sequence[Pair],
    count: int,
    config: DpoConfig,
    *,
    seed: int,
    key: str,
    report: Callable[[int, float], None],
) -> None:
    """Take the steps on all ranks; the ``count`` pairs are looked at on rank 0 only."""
    reference_n2 = _reference(fitting, pairs, count, config.batch_size)

    def accumulate(chosen: list[int]) -> float:
        own, batch = _own(fitting, pairs, chosen)
        # Every rank has the reference of all pairs: two numbers a pair.
        losses_n, slopes_n2 = dpo_loss(_sums(fitting, batch), reference_n2[own], config.beta)
        slopes = (slopes_n2 / len(chosen)).flatten()
        for micro in fitting.micro_batches(batch, share_prompts=True):
            found = fitting.logprobs(micro)
            fitting.backward(found if micro is None else (found * slopes[micro.sequence_t]).sum())
        return float(fitting.ranks.data_sum(float(losses_n.sum()))) / len(chosen)

    fitting.descend(accumulate, count, config, key=key, seed=seed, report=report)


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


def _reference(fitting: Fitting, pairs: Sequence[Pair], count: int, size: int) -> Tensor:
    """Summed log-probs of all pairs as they are now, float64 ``[count, 2]``, on every rank.

    Args:
        size: pairs that are dealt to the ranks at once.
    """
    found = torch.zeros(count, 2, dtype=torch.float64)
    for start in range(0, count, size):
        own, batch = _own(fitting, pairs, list(range(start, min(start + size, count))))
        found[own] = _sums(fitting, batch).cpu()
    united = torch.from_numpy(fitting.ranks.data_sum(found.numpy()))
    return united.to(fitting.policy.model.device)


def _own(fitting: Fitting, pairs: Sequence[Pair], chosen: list[int]) -> tuple[list[int], Batch]:
    """This rank's ones of the ``chosen`` pairs, with their sequences: a pair stays together."""
    ranks, parts = fitting.ranks, None
    if ranks.rank == 0:
        hands = fitting.deal(chosen, lambda index: sum(map(len, pairs[index])))
        parts = ranks.each([(hand, pack_examples(_examples(pairs, hand))) for hand in hands])
    own: tuple[list[int], Batch] = ranks.own(parts)
    return own


@torch.no_grad()
def _sums(fitting: Fitting, batch: Batch) -> Tensor:
    """Log-probs of both responses of each pair, summed in float64, ``[n, 2]``."""
    total = torch.zeros(len(batch), dtype=torch.float64, device=fitting.policy.model.device)
    for micro in fitting.micro_batches(batch, share_prompts=True):
        found = fitting.logprobs(micro)
        if micro is not None:
            total.index_add_(0, micro.sequence_t, found.double())
    fitting.policy.forget_gathered()
    return total.view(-1, 2)


def _examples(pairs: Sequence[Pair], chosen: Sequence[int]) -> list[Example]:
    """Chosen and rejected responses in turn, each behind its prompt."""
    some = (pairs[index] for index in chosen)
    return [(prompt, one) for prompt, *both in some for one in both]
