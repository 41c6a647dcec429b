"""Tensors that are sharded over ranks: into an arena's slot, and into safetensors files.

Every rank writes the block that it holds to where it belongs, in place. Slot and file are the whole
model, once; no rank holds the whole model in its own memory. ``docs/ranks.md`` has figures. A rank
on another host than rank 0 sends its blocks there (``far.py``).

FSDP2 shards a tensor by rows, and tensor parallelism by rows or by columns: a rank holds a range of
both. Replicas hold the same block, and one of them writes it.
"""

import copy
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from kimi_core import _C
from kimi_core.models.lora import plain_state
from kimi_core.models.names import names_in_files
from kimi_core.trainer.ranks import Ranks, deal
from kimi_core.weights import far
from kimi_core.weights.arena import WeightArena, WritableSlot
from kimi_core.weights.layout import Layout

PAGE = 4096
"""Alignment of a slot in an arena's file, in bytes."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Block:
    """The part of a tensor that this process holds: a range of each dimension."""

    held: Tensor
    """At least one dimension."""
    first: tuple[int, ...]
    """Where ``held`` begins in the whole tensor, in each dimension."""
    writes: bool
    """Whether this process writes it, of all those that hold the same."""

    @classmethod
    def of(cls, tensor: Tensor, rank: int) -> "Block":
        """Of a plain tensor the whole, which rank 0 writes."""
        held = tensor.detach()
        if not isinstance(held, DTensor):
            held = held.reshape(1) if held.ndim == 0 else held
            return cls(held, (0,) * held.ndim, rank == 0)
        mesh, placements = held.device_mesh, held.placements
        _, first = compute_local_shape_and_global_offset(held.shape, mesh, placements)
        place = mesh.get_coordinate()
        assert place is not None
        pairs = zip(place, placements, strict=True)
        return cls(held.to_local(), first, not any(n for n, p in pairs if p.is_replicate()))

    @property
    def ranges(self) -> tuple[slice, ...]:
        """What it takes of each dimension of the whole tensor."""
        pairs = zip(self.first, self.held.shape, strict=True)
        return tuple(slice(first, first + length) for first, length in pairs)


def publish_rows(
    arena: tuple[WeightArena, str] | None,
    layout: Layout,
    named: Sequence[tuple[str, Tensor]],
    version: int,
    ranks: Ranks,
    send: Callable[[WritableSlot, list[int]], object] | None = None,
) -> None:
    """Fill a slot of an arena together, sum its entries together, and flip. All ranks call this.

    Args:
        arena: on rank 0, the arena and the path under which other processes find it.
        layout: the arena's.
        named: Hugging Face names and tensors; each rank gives the shards that it has.
        version: as for ``WeightArena.publish``.
        send: on rank 0, flips the slot, given its checksums, here and on other hosts; None: only
            here.

    Raises: ValueError and TimeoutError as ``WeightArena.publish``.
    """
    with ExitStack() as stack:
        slot, where = None, None
        fault: Exception | None = None
        try:
            if arena:
                slot = stack.enter_context(arena[0].writing(version))
                where = (arena[1], arena[0].slots, slot.slot)
        except (ValueError, TimeoutError) as error:
            fault = error
        if said := ranks.fault(str(fault or "")):
            raise fault or ValueError(said)
        path, slots, number = ranks.everywhere(where)
        sums = np.zeros(len(layout.entries), np.int64)
        if ranks.rank in ranks.far:
            dtypes = {one: getattr(torch, part[0].dtype) for one, part in layout.by_hf_name.items()}
            own = _own(named, ranks.rank)
            # Cast before the network, which then has no more bytes than needed.
            far.send((((name, one.first), one.held.to(dtypes[name])) for name, one in own), 0)
            ranks.largest(0)
        else:
            payload = torch.from_numpy(slot.payload if slot else _map(path, slots, number, layout))
            write_rows(payload, layout, _written_here(named, ranks))
            ranks.largest(0)  # Nobody sums before all have written.
            hands = deal([entry.nbytes for entry in layout.entries], len(ranks.near))
            for index in hands[ranks.near.index(ranks.rank)]:
                entry = layout.entries[index]
                held = payload[entry.offset : entry.offset + entry.nbytes]
                sums[index] = _C.crc32c(_buffer(held))
        crcs = ranks.sum(sums).tolist()
        if slot:
            slot.verify(crcs, found=crcs)
            if send:
                send(slot, crcs)
            else:
                slot.commit()


def _own(named: Iterable[tuple[str, Tensor]], rank: int) -> Iterator[tuple[str, Block]]:
    """The blocks that this rank writes, or sends to rank 0."""
    for name, tensor in named:
        block = Block.of(tensor, rank)
        if block.writes and block.held.numel():
            yield name, block


def _written_here(named: Iterable[tuple[str, Tensor]], ranks: Ranks) -> Iterator[tuple[str, Block]]:
    """The blocks that this rank writes: its own, and on rank 0 those of ranks on other hosts."""
    yield from _own(named, ranks.rank)
    for rank in ranks.far if ranks.rank == 0 else ():
        for (name, first), held in far.receive(rank):
            yield name, Block(held, first, writes=True)


def write_rows(slot: Tensor, layout: Layout, blocks: Iterable[tuple[str, Block]]) -> None:
    """Cast blocks of Hugging Face tensors into a slot, where the layout has them.

    Args:
        slot: the payload, uint8 ``[layout.payload_bytes]``.
        blocks: names and what is there of each.
    """
    for name, block in blocks:
        entry, part = layout.by_hf_name[name]
        place = slot[entry.offset : entry.offset + entry.nbytes]
        there = place.view(getattr(torch, entry.dtype)).view(entry.shape)
        source, target = [], []
        for dim, whole in enumerate(block.ranges):
            low, high = whole.start, whole.stop
            shift = part.row if dim == 0 else 0
            if dim == part.dim:
                low, high = max(low, part.start), min(high, part.stop)
                shift -= part.start
            source.append(slice(low - whole.start, max(low, high) - whole.start))
            target.append(slice(low + shift, max(low, high) + shift))
        if all(one.start < one.stop for one in source):
            there[tuple(target)].copy_(block.held[tuple(source)])


@torch.no_grad()
def save_rows(tensors: Mapping[str, Tensor], path: Path, ranks: Ranks) -> None:
    """Write a safetensors file of whole tensors; every rank writes its rows. All ranks call this.

    Raises:
        OSError: a rank could not write, for example because the disk is full.
    """
    if ranks.size == 1:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
        return
    header, places, end = _header(tensors)
    fault: OSError | None = None
    try:
        if ranks.rank == 0:
            with path.open("wb") as file:
                file.write(header)
                os.posix_fallocate(file.fileno(), 0, end)
    except OSError as error:
        fault = error
    _agree(fault, ranks)
    if ranks.rank in ranks.far:
        own = _own(tensors.items(), ranks.rank)
        far.send((((name, block.first), block.held) for name, block in own), 0)
    else:
        fault = _write_all(path, places, tensors, ranks)
    _agree(fault, ranks)


def _write_all(
    path: Path, places: Mapping[str, int], tensors: Mapping[str, Tensor], ranks: Ranks
) -> OSError | None:
    """Write this rank's blocks into the file; what went wrong."""
    blocks = _written_here(tensors.items(), ranks)
    try:
        with path.open("r+b") as file:
            for name, block in blocks:
                _write(file, places[name], block, tensors[name].shape)
    except OSError as error:
        for _ in blocks:  # The other hosts are still sending.
            pass
        return error
    return None


def save_model(model: PreTrainedModel, folder: Path, ranks: Ranks) -> None:
    """Write a model in Hugging Face format; every rank writes its rows. All ranks call this.

    Raises:
        ValueError: transformers would compute other tensors for its files from those of the model.
        OSError: as ``save_rows``.
    """
    if ranks.size == 1:
        model.save_pretrained(folder, state_dict=plain_state(model))
        return
    if ranks.rank == 0:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        config.save_pretrained(folder)  # Makes the folder.
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    stored = dict(model.named_parameters(remove_duplicate=False)).keys()
    tied = stored - dict(model.named_parameters()).keys()
    plain = {name: value for name, value in plain_state(model).items() if name not in tied}
    written = names_in_files(model, plain)
    if lost := [name for name, other in written.items() if not other]:
        raise ValueError(
            f"{lost[0]} of {type(model).__name__} does not stand in a checkpoint as it is, so "
            "several ranks cannot write one: set trainer.ranks = 1"
        )
    tensors = {written[name]: value for name, value in plain.items()}
    save_rows(tensors, folder / "model.safetensors", ranks)


def load_rows(path: Path, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of each tensor in a safetensors file, whoever wrote it. All ranks call this.

    Args:
        path: of the file, on rank 0's host.
        like: tensors of the same names and shapes, sharded or whole. A tensor that is not among
            them is read whole.
    """
    wanted = {
        name: Block.of(tensor, 0).ranges
        for name, tensor in like.items()
        if isinstance(tensor, DTensor)
    }
    everyone: list[Any] = [None] * ranks.size
    if ranks.far:
        dist.all_gather_object(everyone, wanted)
    if ranks.rank in ranks.far:
        return dict(far.receive(0))
    found = dict(_read(path, wanted))
    if ranks.rank == 0:
        for rank in ranks.far:
            far.send(_read(path, everyone[rank]), rank)
    return found


def _read(path: Path, wanted: Mapping[str, tuple[slice, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file: what is ``wanted`` of it, or all of it."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name in wanted:
                yield name, file.get_slice(name)[wanted[name]]
            else:
                yield name, file.get_tensor(name)


def _write(file: BinaryIO, begin: int, block: Block, shape: torch.Size) -> None:
    """Write a block of a tensor of ``shape`` that begins at byte ``begin`` of the file."""
    held = block.held.cpu().contiguous()
    if held.shape[1:] == shape[1:]:  # Whole rows, which are adjacent.
        pieces = [(block.first[0] * held[0].numel(), held)]
    else:
        width = shape[1]
        start = block.first[0] * width + block.first[1]
        pieces = [(start + row * width, values) for row, values in enumerate(held)]
    for place, values in pieces:
        file.seek(begin + place * held.element_size())
        file.write(_buffer(values.flatten().view(torch.uint8)))


def _map(path: str, slots: int, slot: int, layout: Layout) -> np.ndarray:
    """The payload of a slot of another process's arena, uint8 ``[payload_bytes]``, to write into.

    The slots are the end of the file, each a whole number of pages (``docs/weight_protocol.md``).

    Args:
        path: of the arena; its process has begun to write into the slot.
        slots: of the arena.
        slot: number of the slot.
    """
    each = -(-layout.payload_bytes // PAGE) * PAGE
    offset = os.stat(path).st_size - (slots - slot) * each
    return np.memmap(path, np.uint8, "r+", offset, (layout.payload_bytes,))


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, where each tensor begins in it, and the file's size."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    # The widest dtypes first: each tensor is aligned to its elements.
    for name, tensor in sorted(tensors.items(), key=lambda one: -one[1].element_size()):
        begins[name], end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}, len(head) + end


def _agree(fault: OSError | None, ranks: Ranks) -> None:
    """Raise OSError on every rank if one has a fault."""
    if said := ranks.fault(str(fault or "")):
        raise fault or OSError(said)


def _buffer(bytes_: Tensor) -> memoryview:
    flat: Any = bytes_.numpy()
    return memoryview(flat)
