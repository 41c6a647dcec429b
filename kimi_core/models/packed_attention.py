"""Causal attention of sequences that lie end to end in one row, without a mask of the row.

transformers calls ``attend`` under the name ``NAME``. The ``Packing`` of the row comes as a keyword
through the model's own keyword arguments. A call without one goes to SDPA, as any plain forward
does.

Sequences of similar length are computed together: their columns are gathered into ``[n, h, l, d]``,
and one causal call computes all n. What is gathered is as long as the row, or up to ``SLACK`` times
as long, so memory grows with the number of tokens. Siblings may share their prompt: their columns
then name the prompt's columns, each sibling's own after them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kimi_core.models.causal_attention import causal
from kimi_core.models.ulysses import to_columns, to_heads

NAME = "kimi_packed"

SLACK = 1.25
"""Most columns that a group of sequences is padded to, over those that it has."""

BRIEF = 64
"""Sequences up to this many columns are computed together however their lengths differ."""


@dataclass(frozen=True)
class Piece:
    """One sequence: what it attends to, and which outputs are its own."""

    spans: tuple[tuple[int, int], ...]
    """Columns [from, to) of the row that make up the sequence, in its order."""
    skip: int = 0
    """Leading columns whose outputs another sequence computes: a shared prompt."""

    def __len__(self) -> int:
        return sum(end - start for start, end in self.spans)

    def columns(self) -> Tensor:
        """int64."""
        return torch.cat([torch.arange(*span) for span in self.spans])


@dataclass(frozen=True)
class Group:
    """n sequences that one call computes, padded to l columns."""

    columns_nl: Tensor
    """Columns of the row, int64; a short sequence repeats its last one."""
    outputs_t: Tensor | None
    """Which of the n · l outputs are used, int64; None: all."""
    start: int | None
    """Where the columns begin if they are all adjacent; then nothing is gathered."""


@dataclass(frozen=True)
class Packing:
    """The sequences of a row, in groups of similar length."""

    groups: tuple[Group, ...]
    order_t: Tensor | None
    """Where each column of the row stands among the outputs of all groups; None: in its place."""
    columns: int = 0
    """Columns of the row, if ``group`` shares them."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the columns (``ulysses``); None: they are all here."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device | str = "cpu") -> "Packing":
        """Group ``pieces``, which together have an output for each column of the row."""
        pieces = sorted(pieces, key=len, reverse=True)
        columns_t = torch.cat([piece.columns()[piece.skip :] for piece in pieces])
        order_t = None
        if not torch.equal(columns_t, torch.arange(len(columns_t))):
            order_t = columns_t.argsort().to(device)
        return cls(tuple(_group(some, device) for some in _neighbours(pieces)), order_t)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Have a model that computes attention by SDPA take packings; False if it cannot."""
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    model.set_attn_implementation(NAME)
    return True


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls.

    Args:
        query: ``[1, heads, columns, head_dim]`` with a packing; the columns of this rank if its
            group shares them.
        attention_mask: not looked at with a packing.

    Returns the output, ``[1, columns, heads, head_dim]``, and no weights.

    Raises:
        NotImplementedError: the layer adds something to its scores, or is not causal.
    """
    if packing is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    added = [name for name in ("position_bias", "softcap", "s_aux") if kwargs.get(name) is not None]
    if added or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise NotImplementedError(f"{type(module).__name__}: {', '.join(added) or 'not causal'}")
    if packing.group is None:
        return _attend(query, key, value, packing, scaling, sliding_window)[None], None
    padding = packing.group.size() * query.shape[2] - packing.columns
    q, k, v = (
        to_heads(x[0], packing.group)[None, :, : packing.columns] for x in (query, key, value)
    )
    out_lhd = _attend(q, k, v, packing, scaling, sliding_window)
    out_hld = torch.nn.functional.pad(out_lhd.transpose(0, 1), (0, 0, 0, padding))
    return to_columns(out_hld, packing.group).transpose(0, 1)[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of all columns of a row, ``[columns, heads, head_dim]``."""
    outputs = []
    for group in packing.groups:
        q, k, v = (_gathered(x, group) for x in (query, key, value))
        out = causal(q, k, v, scaling, sliding_window).transpose(1, 2).flatten(0, 1)
        outputs.append(out if group.outputs_t is None else out.index_select(0, group.outputs_t))
    out_tnd = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if packing.order_t is not None:
        out_tnd = out_tnd.index_select(0, packing.order_t)
    return out_tnd


def _gathered(x: Tensor, group: Group) -> Tensor:
    """``[1, h, columns, d]`` to ``[n, h, l, d]``."""
    n, length = group.columns_nl.shape
    if group.start is None:
        taken = x[0].index_select(1, group.columns_nl.flatten())
    else:
        taken = x[0, :, group.start : group.start + n * length]
    return taken.unflatten(1, (n, length)).transpose(0, 1)


def _neighbours(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut ``pieces``, longest first, into groups that are padded little."""
    some: list[Piece] = []
    columns = 0
    for piece in pieces:
        longest = len(some[0]) if some else 0
        padded = longest * (len(some) + 1)
        if longest > BRIEF and padded > SLACK * (columns + len(piece)):
            yield some
            some, columns = [], 0
        some.append(piece)
        columns += len(piece)
    yield some


def _group(pieces: Sequence[Piece], device: torch.device | str) -> Group:
    columns = [piece.columns() for piece in pieces]
    columns_nl = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)
    n, length = columns_nl.shape
    place_l = torch.arange(length)
    lengths_n1 = torch.tensor([[len(piece)] for piece in pieces])
    skips_n1 = torch.tensor([[piece.skip] for piece in pieces])
    columns_nl = torch.where(place_l < lengths_n1, columns_nl, columns_nl.gather(1, lengths_n1 - 1))
    used_nl = (place_l >= skips_n1) & (place_l < lengths_n1)
    start = int(columns_nl[0, 0])
    adjacent = torch.equal(columns_nl.flatten(), torch.arange(start, start + n * length))
    outputs_t = None if bool(used_nl.all()) else used_nl.flatten().nonzero()[:, 0].to(device)
    return Group(columns_nl.to(device), outputs_t, start if adjacent else None)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
