"""What an arena hands out: leases to read a version in place, and idle slots to fill with one."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from kimi_core import _C
from kimi_core.weights.gather import Source

if TYPE_CHECKING:
    from kimi_core.weights.arena import WeightArena


def default_threads() -> int:
    """A thread for each CPU of this process, 8 at most."""
    return min(8, len(os.sched_getaffinity(0)))


class Lease:
    """The right to read one version in place, until ``release`` or the end of the process.

    Its views stay mapped after that, but another version may come to stand in them: whatever reads
    them keeps the lease. A lease that is collected is released. It belongs to the process that took
    it, not to its forked children.

    The memory is read-only: a store through a torch tensor, which cannot say so, is a segmentation
    fault.
    """

    def __init__(self, arena: "WeightArena", held: _C.WeightLease) -> None:
        self.arena = arena
        self.layout = arena.layout
        self.version: int = held.version
        self.slot: int = held.slot
        self._held = held
        self.verified = False
        """Whether ``verify`` has found it whole."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every entry of the layout under the engine's name, in the layout's shape and dtype."""
        return self._views()[0]

    @property
    def hf_tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor under its Hugging Face name, tied ones under each; of a tensor that is
        sharded, this rank's part. Views of the same memory as ``tensors``."""
        return self._views()[1]

    @property
    def payload(self) -> np.ndarray:
        """The whole slot, uint8 ``[layout.payload_bytes]``, read-only."""
        self._check_held()
        view = self.arena._core._payload(self.slot)
        view.setflags(write=False)
        return view

    @property
    def crcs(self) -> list[int]:
        """CRC32C of each entry's bytes, in the layout's order.

        Raises:
            ValueError: they are damaged, or the lease was released.
        """
        self._check_held()
        return self.arena._core._crcs(self.slot)

    def verify(self, *, threads: int | None = None) -> None:
        """Compare every byte with the checksums that it was published with, and make the views.

        Raises:
            ValueError: a tensor is damaged; the message names it.
        """
        crcs = self.crcs
        bad = self.arena._core._first_damaged(self.slot, crcs, threads or default_threads())
        if bad is not None:
            raise ValueError(
                f"{self.arena.path} is damaged: {self.layout.entries[bad].name} of version "
                f"{self.version} fails its checksum; keep the version you have and publish again"
            )
        self._views()
        self.verified = True

    @property
    def held(self) -> bool:
        return self._held.held

    def release(self) -> None:
        """Let the slot be written again. Again: nothing happens."""
        self._held.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _views(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        self._check_held()
        return self.arena._views_of(self.slot)

    def _check_held(self) -> None:
        if not self.held:
            raise ValueError(f"The lease on version {self.version} was released: acquire a new one")


class WritableSlot:
    """An idle slot that is being filled from elsewhere; ``WeightArena.writing`` gives it."""

    def __init__(self, arena: "WeightArena", slot: int, version: int) -> None:
        self.layout = arena.layout
        self.version = version
        self._arena = arena
        self._slot = slot
        self._verified: list[int] | None = None
        self._payload: np.ndarray | None = arena._core._writable(slot)

    @property
    def payload(self) -> np.ndarray:
        """The whole slot, uint8 ``[layout.payload_bytes]``, writable until ``commit``.

        Raises:
            ValueError: it was committed or abandoned.
        """
        return self._check_open()

    def write(
        self, sources: Sequence[Source], *, first: int, count: int, threads: int | None = None
    ) -> list[int]:
        """Cast, sum and copy the sources of ``count`` entries, from entry ``first`` on; returns
        their checksums."""
        self._verified = None
        threads = threads or default_threads()
        return self._arena._core._write(self._slot, list(sources), threads, first, count)

    def verify(
        self,
        crcs: Sequence[int],
        *,
        found: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        """Compare the bytes in the slot with the checksums they shall have, one an entry.

        Args:
            crcs: what they shall be.
            found: what they are, where the caller has summed the bytes as they came in.

        Raises:
            ValueError: a tensor differs; the message names it, and nothing is served.
        """
        self._verified = None
        expected = [int(crc) for crc in crcs]
        self._check_open()
        if found is None:
            threads = threads or default_threads()
            bad = self._arena._core._first_damaged(self._slot, expected, threads)
        else:
            pairs = enumerate(zip(expected, found, strict=True))
            bad = next((index for index, (a, b) in pairs if a != b), None)
        if bad is not None:
            raise ValueError(
                f"Version {self.version} did not arrive whole in {self._arena.path}: "
                f"{self.layout.entries[bad].name} fails its checksum; version "
                f"{self._arena.active_version} is served on, send it again"
            )
        self._verified = expected

    def commit(self, crcs: Sequence[int] | None = None) -> None:
        """Serve the version. With ``crcs`` they are verified first; else ``verify`` has been called
        and nothing was written since.

        Raises:
            ValueError: as ``verify``, or it was not called.
        """
        if crcs is not None:
            self.verify(crcs)
        if self._verified is None:
            raise ValueError(
                f"Version {self.version} is not verified: call verify(crcs), or commit(crcs)"
            )
        self._end()
        self._arena._core._commit(self._slot, self.version, self._verified)

    def abandon(self) -> None:
        """Leave the slot idle; what is served stays. After ``commit``: nothing happens."""
        if self._payload is not None:
            self._end()
            self._arena._core._abandon(self._slot)

    def _check_open(self) -> np.ndarray:
        if self._payload is None:
            raise ValueError(f"Version {self.version} was committed or abandoned already")
        return self._payload

    def _end(self) -> None:
        self._check_open().setflags(write=False)
        self._payload = None
