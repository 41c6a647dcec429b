"""Log-probs of given tokens from hidden states and the output matrix, without the logits.

Logits ``[T, V]`` are formed ``chunk`` rows at a time, in the forward pass and again in the backward
pass; what is kept between the two is two floats a token. Shape suffixes: t tokens, d hidden size,
v vocabulary, c rows of a chunk.
"""

import torch
from torch import Tensor


def linear_logprob_ref(
    hidden_td: Tensor,
    weight_vd: Tensor,
    ids_t: Tensor,
    *,
    temperature: float = 1.0,
    bias_v: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The slow twin: all logits at once, in the dtype that the inputs come in."""
    logits_tv = hidden_td @ weight_vd.T
    if bias_v is not None:
        logits_tv = logits_tv + bias_v
    if softcap is not None:
        logits_tv = softcap * torch.tanh(logits_tv / softcap)
    logprobs_tv = torch.log_softmax(logits_tv / temperature, dim=-1)
    return logprobs_tv.gather(1, ids_t.long()[:, None])[:, 0]


def linear_logprob(
    hidden_td: Tensor,
    weight_vd: Tensor,
    ids_t: Tensor,
    *,
    temperature: float = 1.0,
    bias_v: Tensor | None = None,
    softcap: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Log-probs of ``ids_t`` under ``softmax(hidden @ weight.T / temperature)``.

    Args:
        hidden_td: ``[T, D]``, any floating dtype.
        weight_vd: ``[V, D]``, the same dtype.
        ids_t: ``[T]``, integers in ``[0, V)``.
        temperature: > 0, the one the tokens were sampled with.
        bias_v: ``[V]``, added to the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        chunk: rows of logits that exist at once.

    Returns:
        ``[T]`` float32, in nats; differentiable in hidden, weight and bias.

    Raises:
        ValueError: shapes do not fit, an id is out of range, or the temperature is not positive.
    """
    dimensions = (hidden_td.dim(), weight_vd.dim(), ids_t.dim())
    if dimensions != (2, 2, 1) or (len(ids_t), weight_vd.shape[1]) != tuple(hidden_td.shape):
        raise ValueError(
            f"Shapes do not fit: hidden {tuple(hidden_td.shape)} must be [T, D], "
            f"weight {tuple(weight_vd.shape)} [V, D], ids {tuple(ids_t.shape)} [T]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: log-probs need one greater than 0")
    ids_t = ids_t.long()
    if len(ids_t) and not (0 <= int(ids_t.min()) and int(ids_t.max()) < len(weight_vd)):
        raise ValueError(
            f"Token ids from {int(ids_t.min())} to {int(ids_t.max())}: "
            f"the vocabulary has 0 to {len(weight_vd) - 1}"
        )
    result: Tensor = _LinearLogProb.apply(
        hidden_td, weight_vd, bias_v, ids_t, temperature, softcap, chunk
    )
    return result


def _logits(
    hidden_cd: Tensor, weight_vd: Tensor, bias_v: Tensor | None, softcap: float | None
) -> Tensor:
    """float32 ``[C, V]``: the GEMM in the inputs' dtype, everything after it in float32."""
    logits_cv = (hidden_cd @ weight_vd.T).float()
    if bias_v is not None:
        logits_cv += bias_v
    if softcap is not None:
        logits_cv.div_(softcap).tanh_().mul_(softcap)
    return logits_cv


class _LinearLogProb(torch.autograd.Function):
    """Saves the inputs, and of each row its largest logit and the sum of exp(logit - largest).

    The two stay apart: their log-sum-exp in one float32 would lose the sum's digits to a large
    maximum. The backward forms the logits anew.
    """

    @staticmethod
    def forward(ctx, hidden_td, weight_vd, bias_v, ids_t, temperature, softcap, chunk):  # type: ignore[no-untyped-def]
        logprobs_t = hidden_td.new_empty(len(ids_t), dtype=torch.float32)
        top_t, total_t = torch.empty_like(logprobs_t), torch.empty_like(logprobs_t)
        for start in range(0, len(ids_t), chunk):
            part = slice(start, start + chunk)
            scaled_cv = _logits(hidden_td[part], weight_vd, bias_v, softcap).div_(temperature)
            # Shifted by the maximum and summed in float64: float32 log_softmax on a CPU is biased
            # on peaked rows, and a response sums thousands of these.
            top_c = scaled_cv.amax(dim=1)
            picked_c = scaled_cv.gather(1, ids_t[part, None])[:, 0] - top_c
            total_c = scaled_cv.sub_(top_c[:, None]).exp_().sum(dim=1, dtype=torch.float64)
            logprobs_t[part] = (picked_c - total_c.log()).float()
            top_t[part], total_t[part] = top_c, total_c.float()
        ctx.save_for_backward(hidden_td, weight_vd, bias_v, ids_t, top_t, total_t)
        ctx.settings = (temperature, softcap, chunk)
        return logprobs_t

    @staticmethod
    def backward(ctx, grad_t):  # type: ignore[no-untyped-def]
        hidden_td, weight_vd, bias_v, ids_t, top_t, total_t = ctx.saved_tensors
        temperature, softcap, chunk = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dhidden_td = torch.empty_like(hidden_td) if need_hidden else None
        # Gradients of the weights are summed over many chunks: in float32, whatever the inputs are.
        dweight_vd = torch.zeros_like(weight_vd, dtype=torch.float32) if need_weight else None
        dbias_v = torch.zeros_like(bias_v, dtype=torch.float32) if need_bias else None
        for start in range(0, len(ids_t), chunk):
            part = slice(start, start + chunk)
            logits_cv = _logits(hidden_td[part], weight_vd, bias_v, softcap)
            # d logp / d z = (onehot - softmax) / temperature, and softcap's own slope on top.
            slope_cv = None if softcap is None else 1 - (logits_cv / softcap) ** 2
            outer_c = grad_t[part] / temperature
            dz_cv = logits_cv.div_(temperature).sub_(top_t[part, None]).exp_()
            dz_cv.mul_(-(outer_c / total_t[part])[:, None])
            dz_cv[torch.arange(len(dz_cv), device=dz_cv.device), ids_t[part]] += outer_c
            if slope_cv is not None:
                dz_cv.mul_(slope_cv)
            operand_cv = dz_cv.to(hidden_td.dtype)
            if dhidden_td is not None:
                dhidden_td[part] = operand_cv @ weight_vd
            if dweight_vd is not None:
                dweight_vd += operand_cv.T @ hidden_td[part]
            if dbias_v is not None:
                dbias_v += dz_cv.sum(dim=0)
        return (
            dhidden_td,
            None if dweight_vd is None else dweight_vd.to(weight_vd.dtype),
            None if dbias_v is None else dbias_v.to(bias_v.dtype),
            *[None] * 4,
        )
