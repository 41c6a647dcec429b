"""Publishing: how the trainer's weights get to the engines, between iterations.

An engine in the trainer's process reads a module that shares the trainer's parameters
(``module_to_read``), so ``InPlace`` moves nothing. Engines in other processes read an arena in
shared memory, and ``ArenaPublisher`` copies each version there.

The trainer does not keep its parameters in a slot of the arena. Publishing would then be a flip
without a copy, but nobody may train in the slot that is served. The next update would have to start
in another slot, with a copy of the same bytes. The one pass of publishing is that copy.
"""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kimi_core.trainer.ranks import Ranks
from kimi_core.weights.arena import WeightArena, WritableSlot
from kimi_core.weights.broadcast.rounds import BroadcastError, BroadcastSettings
from kimi_core.weights.broadcast.sender import Published, WeightSender
from kimi_core.weights.layout import Layout
from kimi_core.weights.shards import publish_rows

SLOTS = 3
"""Slots of an arena: the version served, one that was refused, and the one after that."""

MARGIN = 1 << 24
"""Bytes of shared memory left free for the arena's header and for vLLM."""


log = logging.getLogger(__name__)


class Publisher(Protocol):
    """Takes the trainer's weights to where engines find them."""

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make the tensors available as ``version``.

        Raises: ValueError and TimeoutError as ``WeightArena.publish``; an error leaves the previous
            version as it was.
        """
        ...

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        ...


class InPlace:
    """For an engine that reads the trainer's own parameters: nothing moves."""

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Do nothing: the engine sees an update as soon as the optimizer has taken it."""

    def close(self) -> None:
        """Do nothing: there is no memory to free."""


class CopyInto:
    """For an engine in this process that reads a module with other memory: adapters are merged.

    A parameter that the module shares with the trainer does not move.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self._parameters = dict(module.named_parameters())

    @torch.no_grad()
    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy every tensor to where the module has it, one after another."""
        for name, tensor in named_tensors:
            if self._parameters[name] is not tensor:
                self._parameters[name].copy_(tensor)

    def close(self) -> None:
        """Do nothing: the memory is the module's."""


class ArenaPublisher:
    """Copies each version into one arena per tensor-parallel rank.

    The arenas are made at the first publication. They are files without names in shared memory, so
    nothing is left of them if this process is killed.

    If the trainer has several ranks, all of them publish together. The arenas belong to rank 0. The
    others map the same files, and each rank writes its own rows into the slot.

    Args:
        config: the model's.
        dtype: what engines compute in; the copy casts to it.
        tp_size: tensor-parallel ranks of the engine.
        ranks: of the trainer; None: this process alone.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        tp_size: int = 1,
        ranks: Ranks | None = None,
    ) -> None:
        self._layouts = [
            Layout.from_config(config, dtype=dtype, tp_rank=rank, tp_size=tp_size)
            for rank in range(tp_size)
        ]
        self._ranks = ranks or Ranks()
        self.arenas: list[WeightArena] = []
        """One for each tensor-parallel rank, once a version was published; on rank 0."""
        self._descriptors: list[int] = []
        self._sender: WeightSender | None = None

    def listen(self, host: str, settings: BroadcastSettings, token: bytes) -> tuple[str, int]:
        """Send each version to other hosts, too; return where their receivers join.

        Args:
            host: address of this host at which the others reach it.
            settings: limits of a transfer.
            token: what receivers have to know.
        """
        self._make_all()
        self._sender = WeightSender(self.arenas, host=host, settings=settings, token=token)
        return self._sender.address

    def forget(self, name: str) -> None:
        """Do not wait for a receiver on another host that is known to be lost."""
        if self._sender is not None:
            self._sender.forget(name)

    @property
    def layout(self) -> Layout:
        """Of the first arena."""
        return self._layouts[0]

    @property
    def paths(self) -> list[str]:
        """Paths by which other processes open the arenas; empty before the first publication."""
        return [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._descriptors]

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the tensors into a free slot of each arena, then flip the arenas to it.

        Raises: ValueError and TimeoutError as ``WeightArena.publish``.
        """
        tensors = list(named_tensors)
        if self._ranks.rank == 0:
            self._make_all()
        sender = self._sender
        if self._ranks.size > 1:
            for number, layout in enumerate(self._layouts):
                place = (self.arenas[number], self.paths[number]) if self.arenas else None
                send = self._send_filled if sender else None
                publish_rows(place, layout, tensors, version, self._ranks, send)
        elif sender:
            self._send(lambda: sender.publish(tensors, version=version))
        else:
            for arena in self.arenas:
                arena.publish(tensors, version=version)

    def _send_filled(self, slot: WritableSlot, crcs: list[int]) -> None:
        sender = self._sender
        assert sender is not None
        self._send(lambda: sender.send_filled(slot, crcs))

    def close(self) -> None:
        """Give the memory of the arenas back. Safe to call twice."""
        if self._sender is not None:
            self._sender.close()
        self._sender = None
        for arena, descriptor in zip(self.arenas, self._descriptors, strict=True):
            arena.close()
            os.close(descriptor)
        self.arenas, self._descriptors = [], []

    def _send(self, send: Callable[[], Published]) -> None:
        """Publish here and on the hosts that take it; those that do not are left behind."""
        assert self._sender is not None
        try:
            published = send()
        except BroadcastError as error:
            log.warning("No other host took the weights: %s", error)
            self._sender.expel()
            published = send()
        for name, why in published.fenced.items():
            log.warning("%s did not get version %d: %s", name, published.version, why)

    def _make_all(self) -> None:
        for layout in self._layouts[len(self.arenas) :]:
            self._make(layout)

    def _make(self, layout: Layout) -> None:
        folder = folder_with_room(SLOTS * layout.payload_bytes)
        with tempfile.TemporaryDirectory(dir=folder, prefix="kimi_core-") as name:
            path = Path(name) / "weights"
            self.arenas.append(WeightArena.create(path, layout, slots=SLOTS))
            self._descriptors.append(os.open(path, os.O_RDWR))


def module_to_read(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers, for an engine to read.

    The engine may switch its mode and its attention implementation without touching the trainer's
    module. An update in place of a parameter shows in both.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def folder_with_room(size: int) -> str | None:
    """A folder in shared memory, or None for one on disk if shared memory is too small.

    Containers often have little shared memory. A file on disk is as fast while its pages are in
    memory.
    """
    memory = Path("/dev/shm")
    free = shutil.disk_usage(memory).free if memory.is_dir() else 0
    return str(memory) if free > size + MARGIN else None
