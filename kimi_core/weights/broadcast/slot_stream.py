"""Work on a slot while its bytes travel: the sender casts tensors into its slot just before they
leave, and the receiver computes checksums just after they arrive."""

from collections.abc import Sequence

import numpy as np
import torch

from kimi_core import _C
from kimi_core.weights.arena import Lease, WeightArena, WritableSlot
from kimi_core.weights.gather import NamedTensors, sources_of


class SlotWriter:
    """Writes the trainer's tensors into an idle slot, entry by entry, shortly before they are sent.

    Raises:
        ValueError: names, shapes or dtypes do not fit the layout. Raised before anything is
            written.
    """

    def __init__(self, arena: WeightArena, slot: WritableSlot, tensors: NamedTensors) -> None:
        self.slot = slot
        self.crcs: list[int] = []
        """Checksums of the entries written so far."""
        self._sources = sources_of(tensors, arena.layout)
        self._next_source = 0

    def make_ready(self, start: int, end: int) -> None:
        """Write every entry that begins before byte ``end`` of the slot and is not written yet.

        The entries before ``start`` are written already.
        """
        entries, first = self.slot.layout.entries, len(self.crcs)
        last = first
        while last < len(entries) and entries[last].offset < end:
            last += 1
        if last == first:
            return
        stop = entries[last - 1].offset + entries[last - 1].nbytes
        sources = []
        while self._next_source < len(self._sources) and self._at(self._next_source) < stop:
            sources.append(self._sources[self._next_source])
            self._next_source += 1
        self.crcs += self.slot.write(sources, first=first, count=last - first)

    def finish(self) -> list[int]:
        """Write the remaining entries, verify the slot, and return the checksums of all entries."""
        self.make_ready(0, self.slot.layout.payload_bytes)
        self.slot.verify(self.crcs, found=self.crcs)
        return self.crcs

    def _at(self, source: int) -> int:
        return self._sources[source][3]


class RunningChecksums:
    """CRC32C of each region of a payload, computed while the bytes arrive in order.

    Args:
        payload: uint8 ``[n]``.
        regions: ``(offset, bytes)``, ascending, without overlap. Bytes between them are ignored.
    """

    def __init__(self, payload: np.ndarray, regions: Sequence[tuple[int, int]]) -> None:
        self._bytes = payload.data
        self._regions = regions
        self._current = 0
        self.crcs = [0] * len(regions)

    def take(self, start: int, end: int) -> None:
        """Add bytes ``start:end``, which follow the bytes added before."""
        while self._current < len(self._regions):
            offset, size = self._regions[self._current]
            first, last = max(start, offset), min(end, offset + size)
            if first < last:
                crc = self.crcs[self._current]
                self.crcs[self._current] = _C.crc32c(self._bytes[first:last], crc)
            if end < offset + size:
                break
            self._current += 1


def regions_of(arena: WeightArena) -> list[tuple[int, int]]:
    """``(offset, bytes)`` of each entry of the layout; each has a checksum."""
    return [(entry.offset, entry.nbytes) for entry in arena.layout.entries]


def bytes_of(lease: Lease) -> torch.Tensor:
    """The leased slot, uint8 ``[n]``, read-only: a write is a segmentation fault."""
    return torch.from_numpy(lease.arena._core._payload(lease.slot))
