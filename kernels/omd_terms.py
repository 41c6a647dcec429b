"""What ``omd_loss`` knows of the responses: the terms of the loss, and which rows share a tile."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_core.kernels.tiles import response_sums

Normalize = Literal["none", "length", "sqrt_length"]


@dataclass(frozen=True)
class Terms:
    """What the loss needs besides the log-probs; t counted tokens, n responses."""

    ref_logprobs_t: Tensor
    advantages_n: Tensor
    norms_n: Tensor
    edges_n: Tensor
    """Response i has tokens edges[i] to edges[i + 1], int64 ``[n + 1]``."""
    tau: float
    cp_group: dist.ProcessGroup | None

    def ratios(self, logprobs_t: Tensor, rows: slice, responses: slice) -> Tensor:
        """ρ of some responses, float64, from the log-probs of all of their tokens."""
        delta_t = logprobs_t[rows] - self.ref_logprobs_t[rows]
        edges_n = self.edges_n[responses.start : responses.stop + 1] - rows.start
        sums_n = response_sums(delta_t, edges_n)
        if self.cp_group is not None:
            # The value is that of all ranks, the gradient that of this rank's tokens.
            all_n = sums_n.detach().clone()
            dist.all_reduce(all_n, group=self.cp_group)
            sums_n = sums_n + (all_n - sums_n.detach())
        return sums_n / self.norms_n[responses]

    def losses(self, ratio_n: Tensor) -> Tensor:
        return (self.advantages_n - self.tau * ratio_n) ** 2 / (2 * self.tau)

    def coefficients(self, ratio_n: Tensor, responses: slice = slice(None)) -> Tensor:
        """∂ℓ_i / ∂ log π_θ, one for all tokens of a response."""
        gap_n = self.advantages_n[responses] - self.tau * ratio_n
        return -gap_n / self.norms_n[responses]


class Group(NamedTuple):
    """Responses [first, last) whose coefficients become known together, and the tiles of their
    rows: one for several short responses, several for one long response."""

    first: int
    last: int
    rows: slice
    tiles: list[slice]


def plan(edges: list[int], chunk: int, *, merge: bool) -> list[Group]:
    """Lay the responses into tiles, the longest first: that one needs no scratch. Without ``merge``
    (context parallelism) every response is a group of its own, in an order that all ranks share."""
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


def make_terms(
    edges: list[int],
    advantages: Tensor,
    ref_logprobs_t: Tensor,
    tau: float,
    normalize: Normalize,
    cp_group: dist.ProcessGroup | None,
) -> Terms:
    device = ref_logprobs_t.device
    edges_n = torch.tensor(edges, device=device)
    lengths_n = edges_n.diff()
    if cp_group is not None:
        dist.all_reduce(lengths_n, group=cp_group)
    norms_n = lengths_n.clamp(min=1).double()
    if normalize != "length":
        norms_n = norms_n.sqrt() if normalize == "sqrt_length" else torch.ones_like(norms_n)
    advantages_n = advantages.to(device, torch.float64)
    return Terms(ref_logprobs_t, advantages_n, norms_n, edges_n, tau, cp_group)
