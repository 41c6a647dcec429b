"""The master's end of a connection to a rollout worker, in another process or on another host."""

import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kimi_core.models.vision import Images, to_send
from kimi_core.rollout import wire
from kimi_core.rollout.work import WorkerGone
from kimi_core.types import Request, Sampling

START_S = 300.0
"""Seconds until a worker serves. Its imports take about 8 CPU-seconds."""


class ConnectedWorker(ABC):
    """Implements what ``Worker`` asks once there is a connection.

    Args:
        number: of this worker in its fleet.
        timeout_s: longest time without a decode step while there is work, in seconds.
        silent_s: seconds after which a worker counts as lost that has work and says nothing.
        images: the run's images, whose pixels it is sent; None: the model reads text only.
    """

    joins: bool

    def __init__(
        self, number: int, *, timeout_s: float, silent_s: float, images: Images | None = None
    ) -> None:
        self.number = number
        self._images = images
        self._shown: set[int] = set()
        """Numbers of the images that it was sent in this call."""
        self.ready = False
        self.policy_version = -1
        self.steps = 0
        self.silent_s = silent_s
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._answers = 0
        """How often it is still to say that it serves a version."""
        self._heard = self._moved = 0.0

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @abstractmethod
    def encode(self, question: tuple[Any, ...]) -> bytes:
        """What is sent for a question."""

    @abstractmethod
    def how_it_ended(self) -> str:
        """Why its connection is closed, as far as that is known."""

    def fileno(self) -> int:
        """What becomes readable when the worker says something or ends."""
        assert self._connection is not None
        return self._connection.fileno()

    def serve(self, version: int) -> None:
        """Have the worker switch to what was published; it is ``ready`` when it has."""
        self.ready = False
        self._answers += 1
        self.ask(("serve", version))

    def begin(self, call: int, sampling: Sampling, most_steps: int) -> None:
        """Announce a call: what is fed from now on belongs to it."""
        self._shown.clear()
        self.ask(("begin", call, sampling, most_steps))

    def feed(self, requests: Sequence[Request]) -> None:
        """Give the worker more to do, and first the images in it that it lacks."""
        if self._images is not None:
            ids = np.unique(np.concatenate([one.token_ids for one in requests]))
            new = sorted({-1 - int(one) for one in ids[ids < 0]} - self._shown)
            if new:
                self.ask(("images", {one: to_send(self._images, one) for one in new}))
                self._shown.update(new)
        self.ask(("feed", list(requests)))

    def stop(self) -> None:
        """Have the worker give up what it was fed."""
        self.ask(("stop",))

    def take(self) -> list[wire.Message]:
        """What the worker has said since the last call. Raises WorkerGone."""
        assert self._connection is not None
        said = []
        try:
            while self._connection.poll():
                said.append(wire.unpacked(self._connection.recv_bytes(), self.number))
        except EOFError as error:
            if not said:  # Otherwise the next call finds the end.
                raise self._gone(error) from error
        except (OSError, ValueError) as error:
            raise self._gone(error) from error
        for message in said:
            self.note(message)
        return said

    def check(self) -> None:
        """Raise WorkerGone if the worker has work and is silent, or makes no step, for too long."""
        now = time.monotonic()
        silent, limit = now - self._heard, self.silent_s if self.policy_version >= 0 else START_S
        if silent > limit:
            raise WorkerGone(f"{self.name} said nothing for {silent:.0f} s")
        if now - self._moved > max(self._timeout_s, limit):
            raise WorkerGone(f"{self.name} made no step for {now - self._moved:.0f} s")

    def connected(self, connection: socket.socket) -> None:
        """Take over a connection to a worker that is about to start."""
        limit = struct.pack("ll", int(self.silent_s), int(self.silent_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, limit)
        self._connection = Connection(connection.detach())
        self._answers = 1
        self._heard = self._moved = time.monotonic()

    def disconnect(self) -> None:
        """Close the connection. Safe to call twice."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self.ready, self.policy_version, self.steps = False, -1, 0

    def note(self, message: wire.Message) -> None:
        """Take account of a message."""
        self._heard = time.monotonic()
        if message.kind == wire.READY:
            self._answers -= 1
            self.ready, self.policy_version = self._answers == 0, message.policy_version
        if message.kind == wire.READY or message.segments or message.steps > self.steps:
            self._moved = self._heard
        if message.kind != wire.HELLO:
            self.steps = max(self.steps, message.steps)

    def ask(self, question: tuple[Any, ...]) -> None:
        """Tell the worker what to do. Raises WorkerGone."""
        self._heard = self._moved = time.monotonic()  # It may have had nothing to do until now.
        self.send(self.encode(question))

    def send(self, message: bytes) -> None:
        """Raises WorkerGone."""
        if self._connection is None:
            raise WorkerGone(f"{self.name} has no connection")
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> WorkerGone:
        if isinstance(error, BlockingIOError):
            return WorkerGone(
                f"{self.name} stopped in the middle of a message for {self.silent_s:g} s"
            )
        if isinstance(error, ValueError):
            return WorkerGone(f"{self.name} sent nonsense: {error}")
        return WorkerGone(self.how_it_ended())
