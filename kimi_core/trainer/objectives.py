"""The policy-optimisation objectives: mirror descent, and three to compare it with.

Each maps the log-probs of the counted tokens to one loss per response; the trainer descends their
mean. Shape suffixes: t counted tokens of all responses, n responses.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

CLIP = 0.2
"""GRPO keeps each token's probability ratio within 1 ± this."""

Normalize = Literal["none", "length", "sqrt_length"]


@dataclass(frozen=True)
class Responses:
    """What an objective needs to know of the responses besides the policy's log-probs."""

    ref_logprobs_t: Tensor
    """Log-prob of each counted token when it was sampled, float32: log π_i."""
    response_t: Tensor
    """Which response each counted token belongs to, int64 in [0, n), not decreasing."""
    advantages_n: Tensor
    """A_j = r_j − r̄."""
    scales_n: Tensor
    """Standard deviation of the rewards in the response's group; only GRPO divides by it."""
    correct_n: Tensor
    """1 for a right answer, else 0; only ReST asks."""

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each response's counted tokens begin, and the last one's end, int64 ``[n + 1]``."""
        lengths_n = torch.bincount(self.response_t, minlength=len(self.advantages_n))
        return torch.nn.functional.pad(lengths_n.cumsum(0), (1, 0))

    def sum(self, values_t: Tensor) -> Tensor:
        """Sum of a per-token value over each response, ``[n]``.

        In float64: sequence-level sums add up thousands of per-token rounding errors.
        """
        total_n = values_t.new_zeros(len(self.advantages_n), dtype=torch.float64)
        return total_n.index_add(0, self.response_t, values_t.double())

    def norms(self, normalize: Normalize) -> Tensor:
        """What each response's sums are divided by, ``[n]``."""
        lengths_n = self.sum(torch.ones_like(self.ref_logprobs_t)).clamp(min=1)
        if normalize == "length":
            return lengths_n
        return lengths_n.sqrt() if normalize == "sqrt_length" else torch.ones_like(lengths_n)


def omd(logprobs_t: Tensor, responses: Responses, *, tau: float, normalize: Normalize) -> Tensor:
    """Online mirror descent (section 2.3.2): ℓ_j = (A_j − τ·ρ_j)² / (2τ), float64 ``[n]``.

    ρ_j = Σ_t [log π_θ − log π_i] is the log-ratio of the whole response, so that the gradient of
    every counted token's log-prob is −(A_j − τ·ρ_j): the report's equation (3).

    The trainer takes it together with the log-probs, as ``kernels.omd_loss``; this is the formula.
    """
    ratio_n = responses.sum(logprobs_t - responses.ref_logprobs_t) / responses.norms(normalize)
    return (responses.advantages_n - tau * ratio_n) ** 2 / (2 * tau)


def reinforce(logprobs_t: Tensor, responses: Responses, *, normalize: Normalize) -> Tensor:
    """Policy gradient with the same baseline and no pull: ℓ_j = −A_j·Σ_t log π_θ, ``[n]``."""
    return -responses.advantages_n * responses.sum(logprobs_t) / responses.norms(normalize)


def grpo(logprobs_t: Tensor, responses: Responses) -> Tensor:
    """GRPO (arXiv 2402.03300) without its KL term: the clipped token-level surrogate with
    A_j divided by the group's standard deviation, averaged over each response, ``[n]``."""
    advantages_t = (responses.advantages_n / (responses.scales_n + 1e-6))[responses.response_t]
    ratio_t = (logprobs_t - responses.ref_logprobs_t).exp()
    clipped_t = ratio_t.clamp(1 - CLIP, 1 + CLIP)
    surrogate_t = torch.minimum(ratio_t * advantages_t, clipped_t * advantages_t)
    return -responses.sum(surrogate_t) / responses.norms("length")


def rest(logprobs_t: Tensor, responses: Responses, *, normalize: Normalize) -> Tensor:
    """ReST (arXiv 2308.08998): fit the right answers, ignore the wrong ones; ``[n]``.

    ``normalize`` chooses between the sum (``none``) and the mean (``length``) of the log-probs.
    """
    return -responses.correct_n * responses.sum(logprobs_t) / responses.norms(normalize)


def baseline(
    rewards: np.ndarray,
    *,
    missing: int,
    expected: float,
    tau: float,
    kind: Literal["mean", "log_partition"],
) -> float:
    """Estimate of τ·log Z from the responses of one prompt (section 2.3.2).

    Args:
        rewards: float64 ``[m]``, of the responses that have ended, in this iteration or before.
        missing: siblings that are still open. Each stands in with what the prompt's success rate
            leads one to expect, so that the few that end first do not set the bar alone.
        expected: that success rate, in [0, 1].
        tau: τ.
        kind: ``mean``: the mean reward, as the report does in practice;
            ``log_partition``: τ·log mean exp(r/τ), whose limit for large τ the mean is.
    """
    total = len(rewards) + missing
    if kind == "mean":
        return (float(rewards.sum()) + missing * expected) / total
    # An open sibling ends with reward 1 with chance `expected`, else with 0.
    outcomes = np.append(rewards, [1.0, 0.0])
    weights = np.append(np.ones(len(rewards)), [missing * expected, missing * (1 - expected)])
    outcomes, weights = outcomes[weights > 0], weights[weights > 0]
    # Shifted by the largest that can happen: exp(1 / τ) overflows, and exp(-1 / τ) vanishes.
    top = float(outcomes.max())
    return float(top + tau * np.log((weights * np.exp((outcomes - top) / tau)).sum() / total))
