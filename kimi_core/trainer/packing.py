"""Packed trajectories to the rectangles that a Hugging Face model takes.

Sequences are sorted by length and laid into rows, longest first, each into the first row with room
(first-fit decreasing): short ones fill what long ones leave over, and little is padding. Several
sequences in one row stay apart by their position ids, which start again at 0; transformers builds
the block-diagonal mask from that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimi_core.types import Batch


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. r rows, l columns, t tokens whose log-prob is wanted."""

    ids_rl: Tensor
    """Token ids, int64; padding is 0."""
    positions_rl: Tensor
    """Position of each token within its own sequence, int64."""
    row_t: Tensor
    """Row and column of the hidden state that predicts each wanted token: the one before it."""
    column_t: Tensor
    source_t: Tensor
    """Index of each wanted token in the packed batch."""
    sequence_t: Tensor
    """Index of each wanted token's sequence in the packed batch."""


def micro_batches(
    batch: Batch,
    wanted: np.ndarray,
    sequences: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """Lay ``sequences`` of ``batch`` into micro-batches of at most ``max_tokens`` tokens, padding
    included; a sequence longer than that gets a micro-batch of its own.

    Args:
        batch: packed trajectories.
        wanted: bool ``[T]``, tokens whose log-prob is wanted. The first token of a sequence has
            nothing before it and cannot be.
        sequences: indices into the batch; those without a wanted token are left out.
        max_tokens: rows times columns at most.
        device: where the tensors go.
    """
    starts = batch.cu_seqlens[:-1]
    lengths = batch.lengths
    counts = np.add.reduceat(wanted, starts) if len(batch) else np.empty(0)
    kept = [index for index in sequences if counts[index]]
    kept.sort(key=lambda index: (-lengths[index], index))
    while kept:
        width = int(lengths[kept[0]])
        rows, kept = _fill_rows(kept, lengths, width, max(1, max_tokens // width))
        yield _lay_out(batch, wanted, rows, width, device)


def _fill_rows(
    sequences: list[int], lengths: np.ndarray, width: int, max_rows: int
) -> tuple[list[list[int]], list[int]]:
    """First-fit decreasing into at most ``max_rows`` rows; returns the rows and what is left."""
    rows: list[list[int]] = []
    room: list[int] = []
    left: list[int] = []
    for index in sequences:
        length = int(lengths[index])
        fitting = next((row for row, free in enumerate(room) if free >= length), None)
        if fitting is not None:
            rows[fitting].append(index)
            room[fitting] -= length
        elif len(rows) < max_rows:
            rows.append([index])
            room.append(width - length)
        else:
            left.append(index)
    return rows, left


def _lay_out(
    batch: Batch,
    wanted: np.ndarray,
    rows: list[list[int]],
    width: int,
    device: torch.device | str,
) -> MicroBatch:
    ids_rl = np.zeros((len(rows), width), np.int64)
    # Padding counts up from 0 too: a sequence of its own, which nothing else attends to.
    positions_rl = np.tile(np.arange(width), (len(rows), 1))
    parts: list[tuple[np.ndarray, ...]] = []
    for row, sequences in enumerate(rows):
        column = 0
        for index in sequences:
            start, end = batch.cu_seqlens[index : index + 2]
            stop = column + end - start
            ids_rl[row, column:stop] = batch.token_ids[start:end]
            positions_rl[row, column:stop] = np.arange(end - start)
            positions_rl[row, stop:] = np.arange(width - stop)
            offsets = np.flatnonzero(wanted[start:end])
            whole = np.full_like(offsets, 1)
            parts.append((row * whole, column + offsets - 1, start + offsets, index * whole))
            column = stop
    row_t, column_t, source_t, sequence_t = (
        torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*parts, strict=True)
    )
    return MicroBatch(
        ids_rl=torch.from_numpy(ids_rl).to(device),
        positions_rl=torch.from_numpy(positions_rl).to(device),
        row_t=row_t,
        column_t=column_t,
        source_t=source_t,
        sequence_t=sequence_t,
    )
