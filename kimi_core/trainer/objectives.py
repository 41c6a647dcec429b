"""Policy-optimisation objectives: mirror descent, and three to compare it with.

An objective maps the log-probs of the counted tokens to one loss per response. The trainer descends
their mean. To add one, write a function with the signature ``Objective`` into a file and name it in
the config: ``trainer.objective = "my_objective.py:my_function"``.

Shape suffixes: t counted tokens of all responses, n responses, m responses of one group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kimi_core.config import TrainerConfig
from kimi_core.kernels import mirror_descent, response_norms
from kimi_core.plugins import load_function
from kimi_core.trainer.packing import MicroBatch
from kimi_core.types import Normalize, TrainingBatch

CLIP = 0.2
"""GRPO keeps each token's probability ratio within 1 ± this."""


@dataclass(frozen=True)
class Responses:
    """The responses of one micro-batch: what happened, besides the policy's log-probs."""

    ref_logprobs_t: Tensor
    """Log-prob of each counted token when it was sampled, float32: log π_i."""
    response_t: Tensor
    """Index of the response that each counted token belongs to, int64 in [0, n), ascending."""
    groups_n: Tensor
    """Group id of each response, int64."""
    rewards_n: Tensor
    """r_j, float64."""
    correctness_n: Tensor
    """The reward function's result, float64; 1 for a right answer."""
    advantages_n: Tensor
    """A_j = r_j − r̄, float64."""
    ended_rewards: Mapping[int, Tensor]
    """Group id → rewards of all its responses that have ended so far, float64 ``[m]``. A
    micro-batch may hold only some of a group's responses, so an objective derives from this what it
    needs to know of the whole group."""

    @classmethod
    def of(cls, batch: TrainingBatch, reference: np.ndarray, micro: MicroBatch) -> Self:
        """Those of ``batch`` in a micro-batch; ``reference`` has log π_i of all its tokens."""
        # The wanted tokens of a sequence are adjacent in a micro-batch.
        members_n, response_t = torch.unique_consecutive(micro.sequence_t, return_inverse=True)
        rows = members_n.cpu().numpy()

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(micro.ids_t.device)

        groups_n = batch.group_ids[rows]
        ended = {int(group): tensor(batch.ended_rewards[group]) for group in np.unique(groups_n)}
        return cls(
            ref_logprobs_t=tensor(reference[micro.source_t.cpu().numpy()]),
            response_t=response_t,
            groups_n=tensor(groups_n),
            rewards_n=tensor(batch.rewards[rows]),
            correctness_n=tensor(batch.correctness[rows]),
            advantages_n=tensor(batch.advantages[rows]),
            ended_rewards=ended,
        )

    @property
    def cu_seqlens(self) -> Tensor:
        """Cumulative counts of the responses' counted tokens, int64 ``[n + 1]``."""
        lengths_n = torch.bincount(self.response_t, minlength=len(self.advantages_n))
        return torch.nn.functional.pad(lengths_n.cumsum(0), (1, 0))

    def sum(self, values_t: Tensor) -> Tensor:
        """Sum of a per-token value over each response, ``[n]``.

        In float64, because a sum over a response adds up thousands of per-token rounding errors.
        """
        total_n = values_t.new_zeros(len(self.advantages_n), dtype=torch.float64)
        return total_n.index_add(0, self.response_t, values_t.double())

    def norms(self, normalize: Normalize) -> Tensor:
        """What each response's sum is divided by, float64 ``[n]``."""
        return response_norms(self.cu_seqlens.diff(), normalize)


Objective = Callable[[Tensor, Responses], Tensor]
"""Log-probs of the counted tokens, float32 ``[t]``, and the responses → one loss each, ``[n]``."""


def omd(logprobs_t: Tensor, responses: Responses, *, tau: float, normalize: Normalize) -> Tensor:
    """Online mirror descent (section 2.3.2), float64 ``[n]``: ``kernels.mirror_descent``.

    Its gradient with respect to every counted token's log-prob is −(A_j − τ·ρ_j), where ρ_j is the
    log-ratio of the whole response: the report's equation (3). The trainer computes this loss
    together with the log-probs, by ``kernels.omd_loss``.
    """
    return mirror_descent(
        logprobs_t,
        responses.ref_logprobs_t,
        responses.advantages_n,
        responses.cu_seqlens,
        tau=tau,
        normalize=normalize,
    )


def reinforce(logprobs_t: Tensor, responses: Responses, *, normalize: Normalize) -> Tensor:
    """Policy gradient with the same baseline and no pull back: ℓ_j = −A_j·Σ_t log π_θ, ``[n]``."""
    return -responses.advantages_n * responses.sum(logprobs_t) / responses.norms(normalize)


def grpo(logprobs_t: Tensor, responses: Responses) -> Tensor:
    """GRPO (arXiv 2402.03300) without its KL term, ``[n]``.

    The clipped token-level surrogate, averaged over each response. A_j is divided by the standard
    deviation of the group's rewards.
    """
    spread = {group: float(r_m.std(correction=0)) for group, r_m in responses.ended_rewards.items()}
    spread_n = responses.advantages_n.new_tensor([spread[int(g)] for g in responses.groups_n])
    advantages_t = (responses.advantages_n / (spread_n + 1e-6))[responses.response_t]
    ratio_t = (logprobs_t - responses.ref_logprobs_t).exp()
    clipped_t = ratio_t.clamp(1 - CLIP, 1 + CLIP)
    surrogate_t = torch.minimum(ratio_t * advantages_t, clipped_t * advantages_t)
    return -responses.sum(surrogate_t) / responses.norms("length")


def rest(logprobs_t: Tensor, responses: Responses, *, normalize: Normalize) -> Tensor:
    """ReST (arXiv 2308.08998): fit the right answers, ignore the wrong ones; ``[n]``.

    ``normalize`` chooses between the sum (``none``) and the mean (``length``) of the log-probs.
    """
    return -responses.correctness_n * responses.sum(logprobs_t) / responses.norms(normalize)


def load_objective(config: TrainerConfig, *, base_folder: str | Path = ".") -> Objective:
    """The function that ``trainer.objective`` names, with its settings.

    Args:
        config: ``objective``, ``tau`` and ``ablation.normalize`` are read.
        base_folder: the folder that a relative ``file.py:function`` starts from.

    Raises:
        ValueError: no built-in objective has this name, or the file or function does not exist.
    """
    name, normalize = config.objective, config.ablation.normalize
    built_in: dict[str, Objective] = {
        "omd": partial(omd, tau=config.tau, normalize=normalize),
        "reinforce": partial(reinforce, normalize=normalize),
        "grpo": grpo,
        "rest": partial(rest, normalize=normalize),
    }
    if name in built_in:
        return built_in[name]
    if ".py:" not in name:
        raise ValueError(
            f"trainer.objective = {name!r}; allowed are {', '.join(built_in)}, or file.py:function"
        )
    return load_function(name, base_folder)
