"""The master's side of workers on other hosts: lets them in, and talks to them.

1. A worker connects to ``cluster.listen``, and both prove that they know the token.
2. The worker sends its name, and gets a ``RemoteStart`` as JSON.
3. The fleet takes the worker when it looks for news. From then on the connection carries
   ``rollout/orders.py`` one way and ``rollout/wire.py`` the other.

A worker that comes again under a name has the number that it had before.
"""

import json
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from kimi_core.cluster.handshake import admit
from kimi_core.models.vision import Images
from kimi_core.rollout import orders, wire
from kimi_core.rollout.connected import ConnectedWorker

NAME_BYTES = 256
"""Longest name of a worker."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteStart:
    """What a worker of another host has to know, as JSON."""

    model: dict[str, Any]
    """The config of the model."""
    architecture: str
    """The class of the model."""
    dtype: str
    text: dict[str, Any] | None
    """How tokens become text (``models/token_text.py``), if the run has stop strings."""
    layout: str
    """SHA-256 of the arena's layout, in hexadecimal."""
    weights: tuple[str, int]
    """Where ``WeightSender`` listens."""
    batch_rows: int
    longest: int | None
    linger_s: float
    silent_s: float
    """After so long without a sign of the master the worker gives up and joins again."""


class RemoteWorker(ConnectedWorker):
    """Implements ``Worker`` with a process of another host.

    Args:
        number: of this worker in its fleet.
        host: the name that it gave.
        connection: to the worker, which has been greeted and told everything.
        forget: called with its name when it is lost.
        timeout_s, silent_s, images: as for ``ConnectedWorker``.
    """

    joins = True

    def __init__(
        self,
        number: int,
        host: str,
        connection: socket.socket,
        *,
        forget: Callable[[str], None],
        timeout_s: float,
        silent_s: float,
        images: Images | None = None,
    ) -> None:
        super().__init__(number, timeout_s=timeout_s, silent_s=silent_s, images=images)
        self._host = host
        self._forget = forget
        self._wanted = -1
        self.connected(connection)

    @property
    def name(self) -> str:
        return f"Rollout worker {self.number} on {self._host}"

    def start(self) -> None:
        """End the connection. The worker notices, and may join again."""
        self._forget(self._host)
        self.disconnect()

    def serve(self, version: int) -> None:
        self._wanted = version
        super().serve(version)

    def note(self, message: wire.Message) -> None:
        super().note(message)
        self.ready = self.ready and self.policy_version == self._wanted

    def close(self) -> None:
        """Tell the worker that the run is over. Safe to call twice."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send_bytes(orders.packed(("end",)))
        self.disconnect()

    def encode(self, question: tuple[Any, ...]) -> bytes:
        return orders.packed(question)

    def how_it_ended(self) -> str:
        return f"{self.name} is gone or cut off"


class Listener:
    """Implements ``Arrivals``. Threads let workers in; ``take`` hands them to the fleet.

    Args:
        address: where to listen; port 0 takes a free one.
        token: what workers have to know.
        start: what each is told.
        first: number of the first worker.
        forget: called with the name of a worker that is lost.
        timeout_s, images: as for ``ConnectedWorker``.
        missing: as ``Arrivals.missing``.

    Raises:
        ValueError: the address is not one of this host, or is in use.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        start: RemoteStart,
        *,
        first: int,
        forget: Callable[[str], None],
        timeout_s: float,
        images: Images | None = None,
        missing: Callable[[], str] = lambda: "",
    ) -> None:
        self._start, self._timeout_s = start, timeout_s
        self._images = images
        self._forget = forget
        try:
            self._server = socket.create_server(address)
        except OSError as error:
            raise ValueError(
                f"Cannot listen on cluster.listen = {address[0]}:{address[1]}: {error}; give an "
                "address of this host at which the others reach it, and a free port"
            ) from error
        self.address = (address[0], self._server.getsockname()[1])
        self.missing = missing
        self._numbers: dict[str, int] = {}
        self._first = first
        self._came: SimpleQueue[RemoteWorker] = SimpleQueue()
        self._news, self._ring = socket.socketpair()
        self._numbering = threading.Lock()
        admit(self._server, token, self._welcome, silent_s=start.silent_s)

    def fileno(self) -> int:
        """What becomes readable when a worker has come."""
        return self._news.fileno()

    def take(self) -> Sequence[RemoteWorker]:
        """The workers that have come since the last call."""
        count = len(self._news.recv(4096))
        return [self._came.get() for _ in range(count)]

    def close(self) -> None:
        """Let nobody in any more. Safe to call twice."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # Ends the thread's wait.
        self._server.close()
        while not self._came.empty():
            self._came.get().close()

    def _welcome(self, connection: socket.socket, channel: Connection) -> None:
        name = channel.recv_bytes(NAME_BYTES).decode()
        channel.send_bytes(json.dumps(asdict(self._start)).encode())
        with self._numbering:
            number = self._numbers.setdefault(name, self._first + len(self._numbers))
        worker = RemoteWorker(
            number,
            name,
            connection.dup(),
            forget=self._forget,
            timeout_s=self._timeout_s,
            silent_s=self._start.silent_s,
            images=self._images,
        )
        self._came.put(worker)
        self._ring.send(b"x")
        log.warning("%s has joined", worker.name)
