"""The versioned arena: weights in shared memory, handed over by a flip, never half-updated.

A trainer writes new weights into an idle slot, then stores one word that names the slot. Engines
lease that slot and read it in place. A slot in use is never written. ``csrc/weights`` does the
work; ``docs/weight_protocol.md`` has the format, the order of stores, and what each crash leaves.

    arena = WeightArena.create("/dev/shm/run", Layout.from_config(config, dtype="float32"))
    arena.publish(model.named_parameters(), version=0)          # in the trainer

    arena = WeightArena.open("/dev/shm/run")                    # in an engine, in any process
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
"""Default number of seconds that a publication waits for a free slot."""

_POLL_S = 0.0005


class WeightArena:
    """An arena file, open to publish (one process) or to read (any number)."""

    def __init__(self, path: str | Path, *, readonly: bool = True) -> None:
        """Same as ``open``, without a check of the layout."""
        self._core = _C.WeightArena(str(path), readonly=readonly)
        self.path = str(path)
        self.layout = Layout.from_json(self._core._description)
        regions = [(entry.offset, entry.nbytes) for entry in self.layout.entries]
        if self.layout.hash != self._core._layout_hash or regions != self._core._regions:
            raise ValueError(
                f"{path} is damaged: the layout hash in its header does not match its table of "
                "tensors; remove the file, create the arena again and publish into it"
            )
        self._views: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    @classmethod
    def create(cls, path: str | Path, layout: Layout, *, slots: int = 3) -> Self:
        """Create an empty arena and open it to publish.

        All memory, ``slots`` times ``layout.payload_bytes``, is allocated and touched at once,
        because the first touch of new shared memory costs seconds per gigabyte.

        Args:
            path: of the new file, in ``/dev/shm`` or on a disk.
            slots: 2 to 8. With 2, a publication waits for every reader of the previous version. A
                third slot keeps one slow reader from delaying it.

        Raises:
            ValueError: ``slots`` is out of range.
            FileExistsError: the file exists. Open it, or remove what an older run left.
            OSError: the memory or the disk is full.
        """
        regions = [(entry.offset, entry.nbytes) for entry in layout.entries]
        _C.WeightArena._create(
            str(path), slots, layout.payload_bytes, layout.hash, regions, layout.to_json()
        )
        try:
            return cls(path, readonly=False)
        except OSError:  # For example, the memory is full.
            Path(path).unlink()
            raise

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = True, layout: Layout | None = None) -> Self:
        """Open an arena to read it or, with ``readonly=False``, to publish.

        Readers need permission to write the file too, because their leases are stored in it.
        Processes that share an arena must see each other's pids.

        Args:
            layout: the expected layout; None accepts any.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not an arena, is damaged or truncated, or has a newer format or
                another layout; or another process has it open to publish.
        """
        arena = cls(path, readonly=readonly)
        if layout is not None and layout.hash != arena.layout.hash:
            raise ValueError(
                f"{path} has another layout: {arena.layout.difference(layout)}. Check that both "
                "sides use the same model, dtype and rank"
            )
        return arena

    @property
    def active_version(self) -> int | None:
        """The version that readers lease now; None before the first."""
        return self._core.active_version

    @property
    def slots(self) -> int:
        return self._core.slots

    def acquire(self) -> "Lease":
        """Lease the active version without waiting. ``Lease.verify`` compares checksums.

        Raises:
            ValueError: no version was published yet, every lease is taken, or the file was
                truncated.
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
        """Cast new weights into an idle slot, compute their checksums in the same pass, then flip.

        All arguments are checked before anything is written. An error leaves the arena as it was.

        Args:
            named_tensors: every Hugging Face name of the layout once, with its whole tensor, in the
                arena's dtype or in float32. A tied name may be given again with the same tensor.
            version: greater than all earlier ones, also those of earlier processes.
            deadline_s: seconds to wait for a slot that is neither active nor leased.
            threads: number of copying threads; None: one for each CPU.

        Raises:
            ValueError: names are missing or unknown, a shape or dtype is wrong, or the version is
                not newer.
            TimeoutError: no slot became free; the message names the processes that hold them.
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
        """Give an idle slot to fill with the bytes of one version and to ``commit``.

        A slot that is not committed when the block ends is abandoned.

        Raises: ValueError and TimeoutError as ``publish``.
        """
        slot = WritableSlot(self, self._begin(version, deadline_s), version)
        try:
            yield slot
        finally:
            slot.abandon()

    def close(self) -> None:
        """Let another process publish; unmap the file with the last view. Safe to call twice."""
        self._views.clear()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, version: int, deadline_s: float) -> int:
        if version < 0:
            raise ValueError(f"version = {version}: allowed are 0 and above")
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
            f"Cannot publish version {version} into {self.path}: none of {self.slots} slots became "
            f"free within {deadline_s:g} s. Active is version {self.active_version}; leased: "
            f"{', '.join(lines) or 'none now'}. Release those leases, stop those processes, or "
            "create the arena with more slots"
        )

    def _views_of(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Entries by name, and parts by Hugging Face name; cached, because a slot never moves."""
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
    """The right to read a version in place, until ``release`` or the end of the process.

    After the release the views stay mapped, but the slot may be filled with another version, so
    keep the lease as long as you read the views. A lease that is garbage-collected is released. A
    lease belongs to the process that took it, not to its forked children.

    The memory is read-only. A write through one of the torch tensors is a segmentation fault,
    because torch has no read-only tensors.
    """

    def __init__(self, arena: WeightArena, held: _C.WeightLease) -> None:
        self.arena = arena
        self.layout = arena.layout
        self.version: int = held.version
        self.slot: int = held.slot
        self._held = held
        self.verified = False
        """Whether ``verify`` has passed."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every entry of the layout under the engine's name, in the layout's shape and dtype."""
        return self._views()[0]

    @property
    def hf_tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor under its Hugging Face name, a tied one under each of its names. Of a
        sharded tensor, this rank's part. The views share the memory of ``tensors``."""
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
            ValueError: the checksums are damaged, or the lease was released.
        """
        self._check_held()
        return self.arena._core._crcs(self.slot)

    def verify(self, *, threads: int | None = None) -> None:
        """Compare every byte with the checksums of the publication, and create the views.

        Raises:
            ValueError: a tensor is damaged; the message names it.
        """
        crcs = self.crcs
        bad = self.arena._core._first_damaged(self.slot, crcs, threads or default_threads())
        if bad is not None:
            raise ValueError(
                f"{self.arena.path} is damaged: {self.layout.entries[bad].name} of version "
                f"{self.version} does not match its checksum. Keep the version you have, and "
                "publish again"
            )
        self._views()
        self.verified = True

    @property
    def held(self) -> bool:
        return self._held.held

    def release(self) -> None:
        """Allow the slot to be overwritten. Safe to call twice."""
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
            raise ValueError(f"The lease on version {self.version} was released; acquire a new one")


class WritableSlot:
    """An idle slot that the caller fills; made by ``WeightArena.writing``."""

    def __init__(self, arena: WeightArena, slot: int, version: int) -> None:
        self.layout = arena.layout
        self.version = version
        self._arena = arena
        self.slot = slot
        self._verified: list[int] | None = None
        self._payload: np.ndarray | None = arena._core._writable(slot)

    @property
    def payload(self) -> np.ndarray:
        """The whole slot, uint8 ``[layout.payload_bytes]``, writable until ``commit``.

        Raises:
            ValueError: the slot was committed or abandoned.
        """
        return self._check_open()

    def write(
        self, sources: Sequence[Source], *, first: int, count: int, threads: int | None = None
    ) -> list[int]:
        """Cast and copy the sources of ``count`` entries from ``first`` on; return checksums."""
        self._verified = None
        threads = threads or default_threads()
        return self._arena._core._write(self.slot, list(sources), threads, first, count)

    def verify(
        self,
        crcs: Sequence[int],
        *,
        found: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        """Compare the bytes in the slot with checksums, one for each entry.

        Args:
            crcs: the expected checksums.
            found: the actual ones, if the caller has computed them already.

        Raises:
            ValueError: a tensor differs; the message names it.
        """
        self._verified = None
        expected = [int(crc) for crc in crcs]
        self._check_open()
        if found is None:
            threads = threads or default_threads()
            bad = self._arena._core._first_damaged(self.slot, expected, threads)
        else:
            pairs = enumerate(zip(expected, found, strict=True))
            bad = next((index for index, (a, b) in pairs if a != b), None)
        if bad is not None:
            raise ValueError(
                f"Version {self.version} arrived damaged in {self._arena.path}: "
                f"{self.layout.entries[bad].name} does not match its checksum. Version "
                f"{self._arena.active_version} stays active; send the new one again"
            )
        self._verified = expected

    def commit(self, crcs: Sequence[int] | None = None) -> None:
        """Make the version active. Verify it first: here, by giving ``crcs``, or by ``verify``.

        Raises:
            ValueError: as ``verify``, or the slot was not verified since the last write.
        """
        if crcs is not None:
            self.verify(crcs)
        if self._verified is None:
            raise ValueError(
                f"Version {self.version} is not verified; call verify(crcs) or commit(crcs)"
            )
        self._end()
        self._arena._core._commit(self.slot, self.version, self._verified)

    def abandon(self) -> None:
        """Give the slot back unused. Does nothing after ``commit``."""
        if self._payload is not None:
            self._end()
            self._arena._core._abandon(self.slot)

    def _check_open(self) -> np.ndarray:
        if self._payload is None:
            raise ValueError(f"Version {self.version} was committed or abandoned already")
        return self._payload

    def _end(self) -> None:
        self._check_open().setflags(write=False)
        self._payload = None


def default_threads() -> int:
    """One thread for each CPU of this process, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))
