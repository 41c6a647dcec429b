"""Argument checks of the public kernels, with their error messages."""

from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_core.kernels.tiles import Head

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(
    hidden: Tensor, head: Head | Tensor, ids: Tensor, *, mask: Tensor | None, chunk: int
) -> Head:
    """Return the head, with this rank's first token id filled in.

    Raises:
        ValueError: a shape, dtype, device, id or number is not allowed.
    """
    head = head if isinstance(head, Head) else Head(head)
    weight, bias = head.weight, head.bias
    dimensions = (hidden.dim(), weight.dim(), ids.dim())
    if dimensions != (2, 2, 1) or (len(ids), weight.shape[1]) != tuple(hidden.shape):
        raise ValueError(
            f"Shapes do not fit: hidden {tuple(hidden.shape)} must be [T, D], "
            f"weight {tuple(weight.shape)} [V, D], ids {tuple(ids.shape)} [T]"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: both must have the same dtype, "
            f"one of {', '.join(map(str, DTYPES))}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}: it must be floating-point, "
            f"[{len(weight)}], one number per row of weight"
        )
    check_tokens("ids", ids, len(hidden), integer=True)
    if mask is not None:
        check_tokens("mask", mask, len(hidden))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}: it must be bool; use `mask > 0`")
    for name, tensor in {"weight": weight, "ids": ids, "bias": bias, "mask": mask}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} and hidden on {hidden.device}: use one device"
            )
    if not head.temperature > 0:
        raise ValueError(f"temperature = {head.temperature}: give one greater than 0")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap = {head.softcap}: give one greater than 0, or None for no cap")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: give at least 1")
    first, vocab = _shard(weight, head.tp_group)
    counted = ids if mask is None else ids[mask]
    if len(counted) and not (0 <= int(counted.min()) and int(counted.max()) < vocab):
        raise ValueError(
            f"Token ids run from {int(counted.min())} to {int(counted.max())}; the vocabulary "
            f"allows 0 to {vocab - 1}"
        )
    return replace(head, first=first)


def check_tokens(name: str, values: Tensor, tokens: int, *, integer: bool = False) -> None:
    """Raise ValueError unless ``values`` has one number per token."""
    if values.shape != (tokens,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: it must be [{tokens}], one per row of hidden"
        )
    if integer and (
        values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    ):
        raise ValueError(f"{name} is {values.dtype}: it must hold integers")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, responses: int) -> list[int]:
    """The edges of the responses as a list. Raises ValueError unless they cover all tokens."""
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: it must hold integers, "
            "one more than there are responses, for at least one response"
        )
    edges = cu_seqlens.tolist()
    rising = all(left <= right for left, right in pairwise(edges))
    if not rising or edges[0] != 0 or edges[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {edges[0]} to {edges[-1]}"
            f"{'' if rising else ' and decreases in between'}: it must rise from 0 to {tokens}, "
            "the number of tokens"
        )
    if responses != len(edges) - 1:
        raise ValueError(f"{responses} advantages for {len(edges) - 1} responses in cu_seqlens")
    return edges


def check_finite(logprobs_t: Tensor) -> None:
    """Raise FloatingPointError if a log-prob is NaN; the message names the first one."""
    bad = logprobs_t.isnan()
    if bad.any():
        raise FloatingPointError(
            f"{int(bad.sum())} of {len(bad)} log-probs are NaN, the first at token "
            f"{int(bad.nonzero()[0])}: its hidden state or the output matrix holds NaN or infinity"
        )


def _shard(weight: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's first token id, and the size of the whole vocabulary."""
    if tp_group is None:
        return 0, len(weight)
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=weight.device) for _ in range(tp_group.size())
    ]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(weight)), group=tp_group)
    counts = [int(size) for size in sizes]
    return sum(counts[: tp_group.rank()]), sum(counts)
