"""A rollout worker: the embedded engine in a process that reads its weights from an arena.

    python -m kimi_core.rollout.torch.worker CONTROL_FD

``process.py`` starts this process, the nursery. It imports everything once, and then forks a worker
for each connection that comes in over the control socket, in milliseconds. It also tells how a
worker ended. It ends when the control socket closes.

All sockets are ends of pairs, so nobody else can connect to them. What a worker is told is pickled:

1. a ``Start``, once the worker has said ``HELLO``. It answers ``READY``, or ``FAULT`` and ends;
2. ``("serve", version)``: switch to the version that the arena has now; ``READY`` or ``FAULT``;
3. ``("begin", call, sampling, most_steps)``, then ``("feed", requests)`` any number of times;
4. ``("images", pixels by number)``: for the requests after it, until the next ``begin``;
5. ``("stop",)``: give up what was fed.

What goes out is in ``rollout/wire.py``. While there is something to do, a message goes out at least
every ``BEAT_S``. A worker ends when the other end of its connection closes, or when the nursery has
ended.
"""

import logging
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from bisect import insort
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel

from kimi_core.models.load import auto_class
from kimi_core.models.vision import SentImages, has_vision
from kimi_core.rollout import wire
from kimi_core.rollout.engine import order
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.torch.rows import Rows
from kimi_core.types import Request, Sampling, Segment
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import bind

BEAT_S = 0.5
"""Seconds between two signs of life, and between two looks at the parent."""

COME_S = 60.0
"""Seconds for which a worker waits for a version that it is to serve; it comes before that, or is
being sent."""

STATUS_S = 1.0
"""Seconds in which a worker ends that has closed its connection, or that was killed."""

RUNS = 256
"""In place of an exit status: the worker has not ended."""


@dataclass(frozen=True)
class Start:
    """What a worker has to know."""

    model: PreTrainedModel
    """The modules and buffers of the model, with placeholders as parameters."""
    arena: str
    """Path of the arena that the parameters are in."""
    batch_rows: int
    longest: int | None
    """As for ``TorchEngine``."""
    threads: int
    """CPU threads of torch."""
    linger_s: float
    """Seconds for which segments may wait for others, to go in one message."""


class Served:
    """An engine that does what comes in over a connection, until the connection ends.

    Args:
        connection: to the master.
        start: what the worker has to know.
        decode: gives the question in a message.
        lost: exit status if the connection ends before the master has said that the run is over.
    """

    def __init__(
        self,
        connection: Connection,
        start: Start,
        decode: Callable[[bytes], tuple[Any, ...]] = pickle.loads,
        *,
        lost: int = 0,
    ) -> None:
        torch.set_num_threads(start.threads)
        self._connection = connection
        self._decode, self._lost = decode, lost
        self._start = start
        self._images = SentImages()
        self._binding = bind(start.model, WeightArena.open(start.arena).acquire())
        self._engine = TorchEngine(
            start.model,
            batch_rows=start.batch_rows,
            policy_version=self._binding.version,
            longest=start.longest,
            images=self._images,
        )
        self._inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._sending = threading.Lock()
        self._next: tuple[Any, ...] | None = None
        """A message that was taken out of the inbox too early."""
        self._busy = False
        self._call = 0
        self._waiting: list[Request] = []
        self._outbox: list[Segment] = []
        self._sent = 0.0

    def run(self) -> None:
        """Work. A thread listens, and ends the process when nobody is at the other end."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(wire.READY)
        sampling, most = Sampling(0.0, 0, frozenset()), 1
        while True:
            self._busy = not self._inbox.empty()
            message, self._next = self._next or self._inbox.get(), None
            match message:
                case ("serve", int(version)):
                    self._serve(version)
                case ("begin", int(call), given, int(most)):
                    self._call, sampling = call, given
                    self._images.forget()
                case ("images", images):
                    self._images.take(images)
                case ("feed", requests):
                    self._wait_for_rows(requests)
                    self._generate(sampling, most)
                case ("stop",):
                    self._waiting.clear()

    def _listen(self) -> None:
        parent = os.getppid()
        try:
            while os.getppid() == parent:
                if self._connection.poll(BEAT_S):
                    question = self._decode(self._connection.recv_bytes())
                    if question == ("end",):
                        os._exit(0)
                    self._inbox.put(question)
                elif self._busy:
                    self._send(wire.SEGMENTS)
        except (EOFError, OSError, ValueError):
            pass
        os._exit(self._lost)

    def _serve(self, version: int) -> None:
        self._busy = True
        ends = time.monotonic() + COME_S
        while (self._binding.lease.arena.active_version or 0) < version:
            if time.monotonic() > ends:
                self._send(wire.FAULT, text=f"version {version} has not come in {COME_S:g} s")
                return
            time.sleep(0.005)
        try:
            self._engine.policy_version = self._binding.follow()
        except ValueError as error:
            self._send(wire.FAULT, text=f"version {version} was refused: {error}")
            return
        self._engine.features.clear()
        self._send(wire.READY)

    def _wait_for_rows(self, requests: Sequence[Request]) -> None:
        for request in requests:
            insort(self._waiting, request, key=order)

    def _generate(self, sampling: Sampling, most_steps: int) -> None:
        """Work off what was fed, and what is fed meanwhile; nothing stays in the outbox."""
        self._busy = True
        rows = Rows(self._start.batch_rows, most_steps, sampling)
        with closing(self._engine.steps(self._waiting, rows)) as steps:
            for segments in steps:
                self._outbox += segments
                if self._outbox and time.monotonic() - self._sent >= self._start.linger_s:
                    self._flush()
                while not self._inbox.empty():
                    match message := self._inbox.get():
                        case ("feed", requests):
                            self._wait_for_rows(requests)
                        case ("images", images):
                            self._images.take(images)
                        case _:  # The call is over: given up, or all of it was sent.
                            self._next = message
                            self._outbox.clear()
                            return
        self._flush()

    def _flush(self) -> None:
        if self._outbox:
            self._send(wire.SEGMENTS, segments=self._outbox)
            self._outbox.clear()
            self._sent = time.monotonic()

    def _send(self, kind: int, segments: Sequence[Segment] = (), text: str = "") -> None:
        message = wire.packed(
            kind,
            call=self._call,
            policy_version=self._engine.policy_version,
            steps=self._engine.decode_steps,
            segments=segments,
            text=text,
        )
        with self._sending:
            self._connection.send_bytes(message)


def work(connection: Connection) -> None:
    """Be a worker until the connection ends."""
    connection.send_bytes(wire.packed(wire.HELLO, steps=os.getpid()))
    try:
        start: Start = pickle.loads(connection.recv_bytes())
        if has_vision(start.model):
            # transformers learns from a constructor what a tower records; unpickling calls none.
            with torch.device("meta"):
                auto_class(start.model.config).from_config(start.model.config)
        served = Served(connection, start)
    except (OSError, ValueError, RuntimeError) as error:
        connection.send_bytes(wire.packed(wire.FAULT, text=f"{type(error).__name__}: {error}"))
        return
    served.run()


def main() -> None:
    """Be the nursery. A message with a descriptor is a connection; any other is a worker's pid."""
    logging.disable(logging.WARNING)  # The run's process has warned.
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 32, 1)
        if not message:
            return
        if not descriptors:
            control.send(str(_status(int(message))).encode())
            continue
        if os.fork() == 0:
            control.close()
            try:
                work(Connection(descriptors[0]))
            except (EOFError, OSError):  # Nobody is at the other end any more.
                pass
            except BaseException:  # noqa: BLE001 - the child must not go on as the nursery does.
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(descriptors[0])


def _status(pid: int) -> int:
    """The exit status of a worker that is about to end, negative for a signal; 256: it runs."""
    ends = time.monotonic() + STATUS_S
    while time.monotonic() < ends:
        with suppress(ChildProcessError):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return RUNS


if __name__ == "__main__":
    main()
