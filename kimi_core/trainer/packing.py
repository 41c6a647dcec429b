"""From packed trajectories to what a Hugging Face model takes.

There are three layouts:

* ``end_to_end``: the sequences of a micro-batch follow each other in one row without padding, and
  attention is told where each begins (``models.packed_attention``). Responses may share their
  prompt: the row holds it once.
* ``rows``: for models that cannot be told. Sequences are sorted by length and laid into rows,
  longest first, each into the first row with room (first-fit decreasing). Position ids that start
  at 0 separate the sequences of a row; transformers builds a mask of l × l from them.
* ``alone``: for models that do not tell sequences apart by positions. Each has a row, and no mask.

A sequence is laid up to the token before the last one that is wanted: no log-prob depends on what
follows. A trained response therefore takes one column less than it has tokens.

In ``rows``, too, responses may share a prompt, if prompts are long and responses short. A block
holds the prompt once and the responses after it as branches; a mask lets each branch see the prompt
and itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kimi_core.models.packed_attention import Packing, Piece
from kimi_core.types import Batch

Layout = Literal["end_to_end", "rows", "alone"]


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
    ids_t: Tensor
    """The wanted tokens, int64."""
    visible_rll: Tensor | None
    """Which columns each column attends to, bool; None: the positions or ``packing`` suffice."""
    packing: Packing | None
    """Which columns make up each sequence, in the layout ``end_to_end``; None in the others."""


@dataclass(frozen=True)
class _Block:
    """Sequences that follow their common first ``prompt`` tokens, which are stored once."""

    sequences: list[int]
    prompt: int
    length: int


PADDING = 1.1
"""Most columns of ``rows``, over the tokens in them, if a model takes ``end_to_end`` as well: masks
save up to a tenth of a pass."""

SHARE_LIMIT = 4096
"""Longest block with a shared prompt, in tokens, in ``rows``: its mask grows with the square."""


def micro_batches(
    batch: Batch,
    wanted: np.ndarray,
    sequences: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    layout: Layout,
    share_prompts: bool = False,
    masks_up_to: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """Lay ``sequences`` of ``batch`` into micro-batches of at most ``max_tokens`` tokens.

    Padding counts. A longer sequence (or block) gets a separate micro-batch.

    Args:
        batch: packed trajectories.
        wanted: tokens whose log-prob is wanted, bool ``[T]``; never the first of a sequence,
            because no token predicts it.
        sequences: indices into the batch; sequences without a wanted token are left out.
        max_tokens: most rows times columns.
        layout: what the model takes (``Policy.layout``).
        share_prompts: lay a prompt once for all its responses; in ``rows`` only if that halves
            their tokens. Not for ``alone``.
        masks_up_to: if no sequence is longer, ``end_to_end`` becomes ``rows``, unless much of
            them would be padding (``Policy.masks_up_to``).
        device: where the tensors go.
    """
    lengths = _needed(batch, wanted)
    kept = [int(index) for index in sequences if lengths[index]]
    sharing = {"end_to_end": (max_tokens, 1), "rows": (SHARE_LIMIT, 2)} if share_prompts else {}
    blocks = _blocks(batch, wanted, lengths, kept, sharing.get(layout))
    if layout == "end_to_end" and max(lengths[kept], default=0) <= masks_up_to:
        needed = sum(block.length for block in blocks)
        in_rows = _blocks(batch, wanted, lengths, kept, sharing.get("rows"))
        if _columns(in_rows) <= PADDING * needed:
            layout, blocks = "rows", in_rows
    while blocks:
        width = blocks[0].length
        most = max(1, max_tokens // width)
        if layout == "end_to_end":
            row, blocks = _take(blocks, max_tokens)
            rows, width = [row], sum(block.length for block in row)
        elif layout == "rows":
            rows, blocks = _fill_rows(blocks, width, most)
        else:
            rows, blocks = [[block] for block in blocks[:most]], blocks[most:]
        yield _lay_out(batch, wanted, lengths, rows, width, layout, device)


def _needed(batch: Batch, wanted: np.ndarray) -> np.ndarray:
    """Tokens of each sequence before its last wanted one, int64 ``[N]``; 0: none is wanted."""
    if not len(batch):
        return np.empty(0, np.int64)
    starts = batch.cu_seqlens[:-1].astype(np.int64)
    place = np.arange(len(wanted)) - starts.repeat(batch.lengths)
    return np.maximum.reduceat(np.where(wanted, place, 0), starts)


def _blocks(
    batch: Batch,
    wanted: np.ndarray,
    lengths: np.ndarray,
    sequences: list[int],
    sharing: tuple[int, int] | None,
) -> list[_Block]:
    """The blocks of ``sequences``, longest first.

    ``sharing`` is the longest block with a shared prompt, and how many times fewer tokens it must
    have than its sequences; None: no prompt is shared.
    """
    if sharing is None:
        blocks = [_Block([index], 0, int(lengths[index])) for index in sequences]
    else:
        blocks = _shared(batch, wanted, lengths, sequences, *sharing)
    return sorted(blocks, key=lambda block: (-block.length, block.sequences))


def _shared(
    batch: Batch,
    wanted: np.ndarray,
    lengths: np.ndarray,
    sequences: list[int],
    limit: int,
    gain: int,
) -> list[_Block]:
    """A block for each prompt that is worth sharing, and one for each other sequence."""
    siblings: dict[bytes, list[int]] = defaultdict(list)
    for index in sequences:
        start, end = batch.cu_seqlens[index : index + 2]
        before = batch.token_ids[start : start + np.flatnonzero(wanted[start:end])[0]]
        siblings[before.tobytes()].append(index)
    blocks = []
    for prompt_ids, members in siblings.items():
        prompt = len(prompt_ids) // batch.token_ids.itemsize
        apart = int(lengths[members].sum())
        together = apart - (len(members) - 1) * prompt
        if len(members) > 1 and gain * together <= apart and together <= limit:
            blocks.append(_Block(members, prompt, together))
        else:
            blocks.extend(_Block([one], 0, int(lengths[one])) for one in members)
    return blocks


def _take(blocks: list[_Block], max_tokens: int) -> tuple[list[_Block], list[_Block]]:
    """The first blocks that have at most ``max_tokens`` together, at least one; and the rest."""
    ends = np.cumsum([block.length for block in blocks])
    count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    return blocks[:count], blocks[count:]


def _columns(blocks: list[_Block]) -> int:
    """Columns of the rows that hold ``blocks``, longest first, padding included."""
    if not blocks:
        return 0
    width = blocks[0].length
    return width * len(_fill_rows(blocks, width, len(blocks))[0])


def _fill_rows(
    blocks: list[_Block], width: int, max_rows: int
) -> tuple[list[list[_Block]], list[_Block]]:
    """First-fit decreasing into at most ``max_rows`` rows; return the rows and the blocks left."""
    rows: list[list[_Block]] = []
    room: list[int] = []
    left: list[_Block] = []
    for block in blocks:
        fitting = next((row for row, free in enumerate(room) if free >= block.length), None)
        if fitting is not None:
            rows[fitting].append(block)
            room[fitting] -= block.length
        elif len(rows) < max_rows:
            rows.append([block])
            room.append(width - block.length)
        else:
            left.append(block)
    return rows, left


def _lay_out(
    batch: Batch,
    wanted: np.ndarray,
    lengths: np.ndarray,
    rows: list[list[_Block]],
    width: int,
    layout: Layout,
    device: torch.device | str,
) -> MicroBatch:
    ids_rl = np.zeros((len(rows), width), np.int64)
    # Padding counts up from 0, too: a separate sequence that no other attends to.
    positions_rl = np.tile(np.arange(width), (len(rows), 1))
    # The block of each column, and its branch; 0 is the shared prompt.
    block_rl = np.full((len(rows), width), -1)
    branch_rl = np.zeros((len(rows), width), np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    for row, blocks in enumerate(rows):
        column = 0
        for number, block in enumerate(blocks):
            trunk, column = column, column + block.prompt
            first = batch.cu_seqlens[block.sequences[0]]
            ids_rl[row, trunk:column] = batch.token_ids[first : first + block.prompt]
            positions_rl[row, trunk:column] = np.arange(block.prompt)
            block_rl[row, trunk : trunk + block.length] = number
            for branch, index in enumerate(block.sequences, 1):
                first = batch.cu_seqlens[index]
                start, end = first + block.prompt, first + lengths[index]
                stop = column + end - start
                ids_rl[row, column:stop] = batch.token_ids[start:end]
                positions_rl[row, column:stop] = block.prompt + np.arange(end - start)
                branch_rl[row, column:stop] = branch
                offsets = np.flatnonzero(wanted[start : end + 1])
                # A branch's first token is predicted at the end of the prompt.
                before = np.where(offsets > 0, column + offsets, trunk + block.prompt) - 1
                one = np.ones_like(offsets)
                parts.append((row * one, before, start + offsets, index * one))
                column = stop
        # In a row of one sequence nobody attends to what follows, and no mask has to hide it.
        first = column if layout == "alone" else 0
        positions_rl[row, column:] = first + np.arange(width - column)
    told = layout == "end_to_end"
    shared = not told and any(len(block.sequences) > 1 for blocks in rows for block in blocks)
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
        ids_t=torch.from_numpy(batch.token_ids.astype(np.int64)).to(device)[source_t],
        visible_rll=_visible(block_rl, branch_rl).to(device) if shared else None,
        packing=Packing.of(list(_pieces(rows[0], lengths)), device) if told else None,
    )


def _pieces(blocks: list[_Block], lengths: np.ndarray) -> Iterator[Piece]:
    """The sequences of a row that holds ``blocks`` end to end."""
    column = 0
    for block in blocks:
        prompt, column = (column, column + block.prompt), column + block.prompt
        for branch, index in enumerate(block.sequences):
            own = (column, column + int(lengths[index]) - block.prompt)
            if branch == 0:
                yield Piece(((prompt[0], own[1]),))
            elif own[1] > own[0]:  # A response of one token needs its prompt alone.
                yield Piece((prompt, own), skip=block.prompt)
            column = own[1]


def _visible(block_rl: np.ndarray, branch_rl: np.ndarray) -> Tensor:
    """Bool ``[r, l, l]``: a column sees earlier columns of its prompt and of its branch."""
    same_block = block_rl[:, :, None] == block_rl[:, None, :]
    on_path = (branch_rl[:, None, :] == 0) | (branch_rl[:, :, None] == branch_rl[:, None, :])
    causal = np.tri(block_rl.shape[1], dtype=bool)
    return torch.from_numpy(same_block & on_path & causal)
