"""The mirror-descent loss (section 2.3.2) of responses whose log-probs are known.

ℓ_i = (A_i − τ·ρ_i)² / (2τ), where ρ_i = Σ_t [log π_θ − log π_i] over the counted tokens of response
i, divided by its norm. This file is the one place that states it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_core.kernels.dispatch import response_sums
from kimi_core.types import Normalize


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the loss besides the log-probs; t counted tokens, n responses."""

    ref_logprobs_t: Tensor
    advantages_n: Tensor
    norms_n: Tensor
    edges_n: Tensor
    """Response i has tokens edges[i] to edges[i + 1], int64 ``[n + 1]``."""
    tau: float
    cp_group: dist.ProcessGroup | None

    def ratios(self, logprobs_t: Tensor, rows: slice, responses: slice) -> Tensor:
        """ρ of ``responses``, float64, from the log-probs of all their tokens, ``rows``."""
        delta_t = logprobs_t[rows] - self.ref_logprobs_t[rows]
        edges_n = self.edges_n[responses.start : responses.stop + 1] - rows.start
        sums_n = response_sums(delta_t, edges_n)
        if self.cp_group is not None:
            # The value is summed over the ranks; the gradient flows to this rank's tokens only.
            all_n = sums_n.detach().clone()
            dist.all_reduce(all_n, group=self.cp_group)
            sums_n = sums_n + (all_n - sums_n.detach())
        return sums_n / self.norms_n[responses]

    def losses(self, ratio_n: Tensor) -> Tensor:
        return (self.advantages_n - self.tau * ratio_n) ** 2 / (2 * self.tau)

    def coefficients(self, ratio_n: Tensor, responses: slice = slice(None)) -> Tensor:
        """∂ℓ_i / ∂ log π_θ, the same number for all tokens of a response."""
        gap_n = self.advantages_n[responses] - self.tau * ratio_n
        return -gap_n / self.norms_n[responses]


class Group(NamedTuple):
    """Responses [first, last) that share one tile, or one long response with several tiles."""

    first: int
    last: int
    rows: slice
    tiles: list[slice]


def plan(edges: list[int], chunk: int, *, merge: bool) -> list[Group]:
    """Divide the responses into tiles, longest first, because the first group needs no scratch.

    Without ``merge``, as context parallelism needs, each response is a group, and all ranks have
    the same order.
    """
    groups: list[Group] = []
    first = 0
    while first < len(edges) - 1:
        last = first + 1
        while merge and last < len(edges) - 1 and edges[last + 1] - edges[first] <= chunk:
            last += 1
        start, length = edges[first], edges[last] - edges[first]
        count = -(-length // chunk)
        cuts = [start + length * i // max(1, count) for i in range(count + 1)]
        tiles = [slice(*cut) for cut in pairwise(cuts)]
        groups.append(Group(first, last, slice(start, start + length), tiles))
        first = last
    return sorted(groups, key=lambda group: -len(group.tiles)) if merge else groups


def loss_inputs(
    edges: list[int],
    advantages: Tensor,
    ref_logprobs_t: Tensor,
    tau: float,
    normalize: Normalize,
    cp_group: dist.ProcessGroup | None,
) -> LossInputs:
    device = ref_logprobs_t.device
    edges_n = torch.tensor(edges, device=device)
    lengths_n = edges_n.diff()
    if cp_group is not None:
        dist.all_reduce(lengths_n, group=cp_group)
    advantages_n = advantages.to(device, torch.float64)
    norms_n = response_norms(lengths_n, normalize)
    return LossInputs(ref_logprobs_t, advantages_n, norms_n, edges_n, tau, cp_group)


def response_norms(lengths_n: Tensor, normalize: Normalize) -> Tensor:
    """The divisor of each response's summed log-probs, float64 ``[n]``, at least 1."""
    norms_n = lengths_n.clamp(min=1).double()
    if normalize == "length":
        return norms_n
    return norms_n.sqrt() if normalize == "sqrt_length" else torch.ones_like(norms_n)


def mirror_descent(
    logprobs_t: Tensor,
    ref_logprobs_t: Tensor,
    advantages_n: Tensor,
    cu_seqlens: Tensor,
    *,
    tau: float,
    normalize: Normalize = "none",
) -> Tensor:
    """The losses ℓ_i of ``omd_loss`` from log-probs, in plain torch; float64 ``[n]``.

    Args:
        logprobs_t: the policy's log-probs of the counted tokens, in nats.
        ref_logprobs_t: log π_i of the same tokens.
        advantages_n: A_i = r_i − r̄.
        cu_seqlens: ``[n + 1]`` integers: response i has tokens cu[i] to cu[i + 1].
        tau: τ > 0.
        normalize: as in ``omd_loss``.
    """
    inputs = loss_inputs(cu_seqlens.tolist(), advantages_n, ref_logprobs_t, tau, normalize, None)
    everything = slice(0, len(logprobs_t)), slice(0, len(advantages_n))
    return inputs.losses(inputs.ratios(logprobs_t, *everything))
