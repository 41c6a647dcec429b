"""Which implementation runs where: plain torch, C++ on a CPU, or Triton on a GPU."""

import importlib.util

import torch
from torch import Tensor

from kimi_core.kernels.tiles import CpuTiles, Head, Tiles


def tiles_for(head: Head, rows: int) -> Tiles:
    """The implementation for the head's device and dtype.

    A GPU without Triton gets plain torch, which is correct and slow.
    """
    device, dtype = head.weight.device, head.weight.dtype
    if dtype != torch.float64 and device.type == "cpu":
        return CpuTiles(head, rows)
    if dtype != torch.float64 and device.type == "cuda" and has_triton():
        from kimi_core.kernels.triton_tiles import TritonTiles, launch_for

        return TritonTiles(head, rows, launch_for(head))
    return Tiles(head, rows)


def response_sums(values_t: Tensor, edges_n: Tensor) -> Tensor:
    """Sums of a per-token value between edges, float64 ``[n]``, differentiable.

    The sums are in float64, because a response has thousands of rounding errors.
    """
    if values_t.is_cuda and has_triton():
        from kimi_core.kernels.triton_tiles import SegmentSum

        sums_n: Tensor = SegmentSum.apply(values_t, edges_n)
        return sums_n
    lengths_n = edges_n.diff()
    response_t = torch.arange(len(lengths_n), device=values_t.device).repeat_interleave(lengths_n)
    zeros_n = torch.zeros(len(lengths_n), dtype=torch.float64, device=values_t.device)
    return zeros_n.index_add(0, response_t, values_t.double())


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
