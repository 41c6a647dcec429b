"""Log-probs of given tokens from hidden states and the output matrix, without the logits.

The logits ``[T, V]`` are computed ``chunk`` rows at a time, in the forward pass and again in the
backward pass. Between the passes two numbers per token are kept.
"""

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_core.kernels.arguments import check_finite, check_head
from kimi_core.kernels.dispatch import tiles_for
from kimi_core.kernels.tiles import CHUNK, Head, WeightSums


def linear_logprob_ref(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The slow twin of ``linear_logprob``: all logits at once, in the inputs' dtype.

    With ``upcast`` it computes in float64. Returns log-probs and entropy, ``[T]``; 0 outside the
    mask.
    """
    head = head if isinstance(head, Head) else Head(head)
    weight, bias, softcap = head.weight, head.bias, head.softcap
    if upcast:
        hidden, weight = hidden.double(), weight.double()
    logits_tv = hidden @ weight.T
    if bias is not None:
        logits_tv = logits_tv + bias.to(logits_tv.dtype)
    if softcap is not None:
        logits_tv = softcap * torch.tanh(logits_tv / softcap)
    logprobs_tv = torch.log_softmax(logits_tv / head.temperature, dim=-1)
    entropy_t = -(logprobs_tv.exp() * logprobs_tv).sum(dim=-1)
    if mask is not None:
        ids = ids.where(mask, 0)
    logprobs_t = logprobs_tv.gather(1, ids.long()[:, None])[:, 0]
    if mask is None:
        return logprobs_t, entropy_t
    return logprobs_t.where(mask, 0), entropy_t.where(mask, 0)


@overload
def linear_logprob(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    chunk: int = ...,
) -> Tensor: ...
@overload
def linear_logprob(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    chunk: int = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int = CHUNK,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``ids`` under ``softmax(hidden @ weight.T / temperature)``.

    Args:
        hidden: ``[T, D]``; float32, bfloat16, float16 or float64 (which is slow). With a
            ``tp_group`` in the head, all ranks give the same hidden states and ids.
        head: the output matrix ``[V, D]``, or a ``Head`` with bias, soft cap and temperature.
        ids: ``[T]``, integers, in ``[0, V)`` inside the mask.
        mask: bool ``[T]``. Rows outside the mask are dropped before the GEMM, so they cost nothing.
            Their log-probs and gradients are 0. None: all rows count.
        return_entropy: also return the entropy of each row's distribution, without a gradient.
        chunk: rows of logits that exist at once.

    Returns:
        ``[T]`` float32 in nats, differentiable in hidden, weight and bias. With ``return_entropy``
        a pair: these, and the entropy, ``[T]`` float32 in nats. For float64 inputs both are
        float64. With a ``tp_group`` all ranks get the same log-probs and the same gradient of
        hidden, and each rank gets the gradient of its rows of the weight.

    Raises:
        ValueError: shapes, dtypes or devices do not match, an id is out of range, or a number is
            not positive.
        FloatingPointError: a log-prob is NaN, because hidden or weight holds NaN or infinity.
    """
    head = check_head(hidden, head, ids, mask=mask, chunk=chunk)
    if mask is None:
        logprobs_t, entropy_t = logprobs_of(hidden, ids.long(), head, chunk)
    else:
        kept = mask.nonzero()[:, 0]
        counted = logprobs_of(hidden[kept], ids[kept].long(), head, chunk)
        logprobs_t, entropy_t = (
            values.new_zeros(len(ids)).index_copy(0, kept, values) for values in counted
        )
    check_finite(logprobs_t)
    return (logprobs_t, entropy_t) if return_entropy else logprobs_t


def logprobs_of(hidden_td: Tensor, ids_t: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
    """Differentiable log-probs, and the entropy, of checked inputs without a mask.

    The results are not checked: a rank that raised here would leave the others waiting.
    """
    logprobs_t, entropy_t = _LinearLogProb.apply(
        hidden_td, head.weight, head.bias, ids_t, head, chunk
    )
    return logprobs_t, entropy_t


class _LinearLogProb(torch.autograd.Function):
    """Two passes with four GEMMs; takes any gradient of the log-probs."""

    @staticmethod
    def forward(ctx, hidden_td, weight_vd, bias_v, ids_t, head, chunk):  # type: ignore[no-untyped-def]
        tiles = tiles_for(head, min(chunk, len(ids_t)))
        logprobs_t = hidden_td.new_empty(len(ids_t), dtype=tiles.dtype)
        entropy_t, top_t = torch.empty_like(logprobs_t), torch.empty_like(logprobs_t)
        total_t = torch.empty_like(logprobs_t, dtype=torch.float64)
        for start in range(0, len(ids_t), chunk):
            rows = slice(start, start + chunk)
            tiles.load(hidden_td[rows], ids_t[rows], keep=False)
            found = tiles.statistics()
            logprobs_t[rows], entropy_t[rows] = found.logprobs(), found.entropy()
            top_t[rows], total_t[rows] = found.top_c, found.total_c
        ctx.save_for_backward(hidden_td, weight_vd, bias_v, ids_t, top_t, total_t)
        ctx.head, ctx.chunk = head, chunk
        ctx.mark_non_differentiable(entropy_t)
        return logprobs_t, entropy_t

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_t, _):  # type: ignore[no-untyped-def]
        hidden_td, _, _, ids_t, top_t, total_t = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # A row with gradient 0, such as a wrong answer under ReST, costs nothing.
        live = grad_t.nonzero()[:, 0]
        tiles = tiles_for(ctx.head, min(ctx.chunk, len(live)))
        sums = WeightSums(tiles, weight=need_weight, bias=need_bias)
        dhidden_td = torch.zeros_like(hidden_td) if need_hidden else None
        for rows in live.split(ctx.chunk):
            hidden_cd = hidden_td[rows]
            tiles.load(hidden_cd, ids_t[rows])
            dz_cv = tiles.gradient(top_t[rows], total_t[rows], grad_t[rows])
            if dhidden_td is not None:
                part_cd = torch.empty_like(hidden_cd)
                tiles.put_dhidden(dz_cv, part_cd)
                dhidden_td[rows] = part_cd
            sums.add(dz_cv, hidden_cd)
        if dhidden_td is not None and ctx.head.tp_group is not None:
            dist.all_reduce(dhidden_td, group=ctx.head.tp_group)
        return dhidden_td, *sums.gradients(), None, None, None
