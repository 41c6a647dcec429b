"""The versioned arena: weights in shared memory, handed over by a flip, never half-updated.

A trainer publishes into an idle slot and then stores one word; engines lease what that word names
and read it in place. A slot in use is never written. ``docs/weight_protocol.md`` has the format,
the order of stores and what each crash leaves; the work is done in C++ (``csrc/weights``).

    arena = WeightArena.create("/dev/shm/run", Layout.from_config(config, dtype="float32"))
    arena.publish(model.named_parameters(), version=0)          # the trainer

    arena = WeightArena.open("/dev/shm/run")                    # an engine, in any process
    with arena.acquire() as lease:
        lease.tensors["model.norm.weight"]                      # a view of the slot
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch

from kimi_core import _C
from kimi_core.weights.gather import NamedTensors, Source, sources_of
from kimi_core.weights.layout import Layout

PUBLISH_S = 30.0
"""Seconds that publishing waits for a slot to come free, unless told otherwise."""

_POLL_S = 0.0005


class WeightArena:
    """An arena file, open to publish (one process) or to read (any number)."""

    def __init__(self, path: str | Path, *, readonly: bool = True) -> None:
        """As ``open``."""
        self._core = _C.WeightArena(str(path), readonly=readonly)
        self.path = str(path)
        self.layout = Layout.from_json(self._core._description)
        regions = [(entry.offset, entry.nbytes) for entry in self.layout.entries]
        if self.layout.hash != self._core._layout_hash or regions != self._core._regions:
            raise ValueError(
                f"{path}: the layout hash in the header is not that of its table of tensors; make "
                "the arena anew and publish into it"
            )
        self._views: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    @classmethod
    def create(cls, path: str | Path, layout: Layout, *, slots: int = 3) -> Self:
        """Make an arena with nothing in it and open it to publish.

        All its memory, ``slots`` times ``layout.payload_bytes``, is taken and touched at once: new
        shared memory costs seconds a gigabyte at its first touch.

        Args:
            path: where no file is yet; in ``/dev/shm``, or on a disk.
            slots: 2 to 8. With 2, publishing waits for every reader of the version before; the
                third is for one that is slow.

        Raises:
            ValueError: ``slots`` is out of range.
            FileExistsError: there is a file already: open it, or remove what an older run left.
            OSError: there is no room.
        """
        regions = [(entry.offset, entry.nbytes) for entry in layout.entries]
        _C.WeightArena._create(
            str(path), slots, layout.payload_bytes, layout.hash, regions, layout.to_json()
        )
        try:
            return cls(path, readonly=False)
        except OSError:  # No room, say.
            Path(path).unlink()
            raise

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = True, layout: Layout | None = None) -> Self:
        """Open an arena, to read beside its publisher or, with ``readonly=False``, to publish.

        Reading needs the right to write the file, too: leases are in it. Processes that share an
        arena must see each other's pids.

        Args:
            layout: what the caller expects to find, if it does.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no arena, damaged, cut off, of a newer format or of another layout; or
                another process has it open to publish.
        """
        arena = cls(path, readonly=readonly)
        if layout is not None and layout.hash != arena.layout.hash:
            raise ValueError(
                f"{path} has another layout: {arena.layout.difference(layout)}; is it of another "
                "model, dtype or rank?"
            )
        return arena

    @property
    def active_version(self) -> int | None:
        """The version that is served; None before the first."""
        return self._core.active_version

    @property
    def readonly(self) -> bool:
        return self._core.readonly

    @property
    def slots(self) -> int:
        return self._core.slots

    def acquire(self) -> "Lease":
        """Lease what is served now; it never waits. ``Lease.verify`` compares checksums.

        Raises:
            ValueError: nothing is served yet, every lease is taken, or the file was cut off.
        """
        return Lease(self, self._core._acquire())

    def publish(
        self,
        named_tensors: NamedTensors,
        *,
        version: int,
        deadline_s: float = PUBLISH_S,
        threads: int | None = None,
    ) -> None:
        """Serve new weights: cast and sum them into an idle slot in one pass, then flip.

        Everything is checked before anything is written, and until the flip the version before is
        served: an error leaves the arena as it was.

        Args:
            named_tensors: every Hugging Face name of the layout once, with its whole tensor, in the
                arena's dtype or in float32. A tied name may be given again with the same tensor.
            version: newer than every one before; versions outlive the process.
            deadline_s: how long to wait for a slot that neither is served nor has a reader.
            threads: that copy; one for each CPU unless given.

        Raises:
            ValueError: names are missing or unknown, a shape or dtype is wrong, or the version is
                not newer.
            TimeoutError: no slot came free; the message says which process holds which.
        """
        sources = sources_of(named_tensors, self.layout)
        slot = self._begin(version, deadline_s)
        try:
            crcs = self._core._write(slot, sources, threads or default_threads())
        except BaseException:
            self._core._abandon(slot)
            raise
        self._core._commit(slot, version, crcs)

    @contextmanager
    def writing(self, version: int, *, deadline_s: float = PUBLISH_S) -> Iterator["WritableSlot"]:
        """An idle slot to fill with a whole version's bytes, and to ``commit`` with its checksums.

        What is not committed when the block ends is abandoned, and the version before is served on.

        Raises: ValueError and TimeoutError as ``publish``.
        """
        slot = WritableSlot(self, self._begin(version, deadline_s), version)
        try:
            yield slot
        finally:
            slot.abandon()

    def close(self) -> None:
        """Let another process publish, and unmap the file once the views and leases are gone, too.
        Again: nothing happens."""
        self._views.clear()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, version: int, deadline_s: float) -> int:
        if version < 0:
            raise ValueError(f"version = {version}: versions count from 0")
        ends = time.monotonic() + deadline_s
        while (slot := self._core._begin(version)) is None:
            if time.monotonic() >= ends:
                raise TimeoutError(self._who_holds(version, deadline_s))
            time.sleep(_POLL_S)
        return slot

    def _who_holds(self, version: int, deadline_s: float) -> str:
        held = sorted({(slot, pid, old) for pid, slot, old in self._core._holders()})
        lines = [f"slot {slot} (version {old}) by pid {pid}" for slot, pid, old in held]
        return (
            f"Cannot publish version {version} into {self.path}: none of {self.slots} slots came "
            f"free within {deadline_s:g} s. Version {self.active_version} is served; held are "
            f"{', '.join(lines) or 'none now'}. Release those leases, stop those processes, or "
            "make the arena with more slots"
        )

    def _views_of(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Entries by name and parts by Hugging Face name; made once, as a slot does not move."""
        if slot not in self._views:
            payload = torch.from_numpy(self._core._payload(slot))
            tensors = {
                entry.name: payload[entry.offset : entry.offset + entry.nbytes]
                .view(getattr(torch, entry.dtype))
                .view(entry.shape)
                for entry in self.layout.entries
            }
            parts = {
                name: tensors[entry.name][part.row : part.row + part.shape[0]]
                for name, (entry, part) in self.layout.by_hf_name.items()
            }
            self._views[slot] = (tensors, parts)
        return self._views[slot]


class Lease:
    """The right to read one version in place, until ``release`` or the end of the process.

    Its views stay mapped after that, but another version may come to stand in them: whatever reads
    them keeps the lease. A lease that is collected is released. It belongs to the process that took
    it, not to its forked children.

    The memory is read-only: a store through a torch tensor, which cannot say so, is a segmentation
    fault.
    """

    def __init__(self, arena: WeightArena, held: _C.WeightLease) -> None:
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

    def __init__(self, arena: WeightArena, slot: int, version: int) -> None:
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


def default_threads() -> int:
    """One thread for each CPU of this process, 8 at most."""
    return min(8, len(os.sched_getaffinity(0)))
