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

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from kimi_core import _C
from kimi_core.weights.gather import NamedTensors, sources_of
from kimi_core.weights.layout import Layout
from kimi_core.weights.slots import Lease, WritableSlot, default_threads

__all__ = ["Lease", "NamedTensors", "WeightArena", "WritableSlot", "default_threads"]

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

    def acquire(self) -> Lease:
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
    def writing(self, version: int, *, deadline_s: float = PUBLISH_S) -> Iterator[WritableSlot]:
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
