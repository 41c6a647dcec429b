"""The engine's attention, as an attention implementation of transformers.

A prefill attends causally, a decode step one token per row, cohort by cohort. ``KVLayer.update``
attaches what the layer sees to the keys. The model passes them to the attention that its config
names. No mask function is registered under that name, so transformers makes no mask.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface

from kimi_core import _C
from kimi_core.models.causal_attention import causal

NAME = "kimi_cohorts"


class Context(NamedTuple):
    """What the tokens of a prefill attend to: the keys and values up to their own."""

    window: int | None
    """A token sees at most this many, the last ones."""


class Part(NamedTuple):
    """What the rows of a cohort attend to in one layer."""

    keys: torch.Tensor
    """``[n, kv_heads, s, head_dim]``, and so are the values."""
    values: torch.Tensor
    mask: torch.Tensor | None = None
    """Additive, ``[n, 1, 1, s]``. None: it hides nothing, or ``lengths`` do its work."""
    lengths: np.ndarray | None = None
    """Positions that each row sees, int64 ``[n]``: for the compiled core."""
    window: int | None = None
    """With ``lengths``: a row sees at most this many positions, the last ones."""


def in_core(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled core attends, which takes lengths and needs no masks."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def attach(keys: torch.Tensor, seen: Context | list[Part]) -> torch.Tensor:
    """Attach to ``keys`` what the rows attend to: in a prefill, or in each cohort."""
    keys.seen = seen  # type: ignore[attr-defined]
    return keys


def attend(
    module: torch.nn.Module,  # noqa: ARG001 - the arguments that transformers gives
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls.

    ``query`` is ``[n, heads, tokens, head_dim]``; the output is ``[n, tokens, heads, head_dim]``,
    without weights.

    Raises:
        AttributeError: the model changed the keys that the cache returned.
    """
    parts: Context | list[Part] = key.seen  # type: ignore[attr-defined]
    if isinstance(parts, Context):
        return causal(query, key, value, scaling, parts.window).transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if len(parts) == 1:
        return one_token(query, parts[0], scale), None
    queries = query.split([len(part.keys) for part in parts])
    outputs = [one_token(q, part, scale) for q, part in zip(queries, parts, strict=True)]
    return torch.cat(outputs), None


def one_token(query_nh1d: torch.Tensor, part: Part, scale: float) -> torch.Tensor:
    """``softmax(scale · q kᵀ + mask) v`` for one query per row, ``[n, 1, heads, head_dim]``.

    The core reads keys and values once. SDPA takes 1.5 to 2 times as long for long rows,
    because its blocks are made for many queries. Elsewhere query heads that share keys take the
    place of a sequence's tokens, so nothing is repeated.
    """
    n, heads, _, dim = query_nh1d.shape
    if part.lengths is not None:
        out = _C.decode_attention(
            query_nh1d.reshape(n, heads, dim).float().contiguous().numpy(),
            _numbers(part.keys),
            _numbers(part.values),
            part.lengths,
            scale=scale,
            window=part.window or 0,
            threads=torch.get_num_threads(),
        )
        return torch.from_numpy(out).to(query_nh1d.dtype)[:, None]
    kv_heads = part.keys.shape[1]
    out_nkgd = torch.nn.functional.scaled_dot_product_attention(
        query_nh1d.reshape(n, kv_heads, heads // kv_heads, dim),
        part.keys,
        part.values,
        attn_mask=part.mask,
        scale=scale,
    )
    return out_nkgd.reshape(n, 1, heads, dim)


def _numbers(stored: torch.Tensor) -> np.ndarray:
    """The storage as the core takes it; numpy has no bfloat16."""
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


AttentionInterface.register(NAME, attend)
