"""Context parallelism by Ulysses (arXiv 2309.14509): ranks share the columns of a row.

Each of n ranks computes all layers for 1/n of the columns. Only attention looks at other columns.
Before it, an all-to-all gives each rank all columns of 1/n of the heads, and after it another one
gives back all heads of the rank's own columns. Shape suffixes: h heads, c columns of one rank,
l columns of the row, d head size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_heads(x_hcd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All columns of this rank's heads, ``[h / n, n · c, d]``.

    With fewer heads than ranks, which keys and values may have, ranks share a head.
    """
    ranks = group.size()
    if x_hcd.shape[0] < ranks:
        x_hcd = x_hcd.repeat_interleave(ranks // x_hcd.shape[0], 0)
    swapped = _AllToAll.apply(x_hcd.unflatten(0, (ranks, -1)), group)
    return swapped.transpose(0, 1).flatten(1, 2)


def to_columns(x_hld: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of all heads, ``[n · h, l / n, d]``; the inverse of ``to_heads``."""
    ranks = group.size()
    swapped = _AllToAll.apply(x_hld.unflatten(1, (ranks, -1)).transpose(0, 1), group)
    return swapped.flatten(0, 1)


class _AllToAll(torch.autograd.Function):
    """Part i of the first dimension goes to rank i; what comes from rank i is part i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, x.contiguous(), group=group)
    return found
