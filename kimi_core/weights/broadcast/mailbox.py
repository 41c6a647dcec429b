"""Messages between the sender and its receivers: small JSON values by key, in a ``TCPStore`` that
the sender serves. Every wait has a deadline, and its error names what was waited for.

The store has no password by itself; with a token nobody reaches it without (``gate.py``). gloo's
ports, over which the weights go, are open while a version is sent and ask for none.
"""

import json
import socket
from collections.abc import Container
from typing import Any

import torch.distributed as dist

from kimi_core.cluster.handshake import Refused
from kimi_core.weights.broadcast.gate import LOOPBACK, Gate, tunnel
from kimi_core.weights.broadcast.transport import Deadline

Message = dict[str, Any]
CONNECT_S = 30.0


class PeerGone(ConnectionError):
    """The sender, which serves the messages, cannot be reached."""


class Mailbox:
    """Messages by key; each is posted once. Not thread-safe."""

    def __init__(
        self, store: dist.TCPStore, host: str, port: int, gate: Gate | None = None
    ) -> None:
        self.store = store
        self.host, self.port = host, port
        """Where it is reached from other hosts."""
        self._gate = gate

    @classmethod
    def serve(cls, host: str, token: bytes | None = None) -> "Mailbox":
        """Serve messages on a free port of ``host``, and on no other address.

        Args:
            token: who connects has to know it; None: nobody is asked.
        """
        inner = host if token is None else LOOPBACK
        listener = socket.create_server((inner, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            inner,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=Deadline.after(CONNECT_S).left(),
            master_listen_fd=listener.detach(),
        )
        gate = None if token is None else Gate(host, port, token)
        return cls(store, host, gate.port if gate else port, gate)

    @classmethod
    def connect(
        cls, host: str, port: int, token: bytes | None = None, *, seconds: float = CONNECT_S
    ) -> "Mailbox":
        """Connect to the messages that another process serves.

        Raises:
            Refused: it has another token.
            PeerGone: nobody answers within ``seconds``.
        """
        limit = Deadline.after(seconds).left()
        inner = (host, port)
        try:
            if token is not None:
                inner = (LOOPBACK, tunnel((host, port), token, seconds=seconds))
            store = dist.TCPStore(*inner, is_master=False, wait_for_workers=False, timeout=limit)
            return cls(store, host, port)
        except Refused:
            raise
        except (dist.DistError, OSError, EOFError) as error:
            raise PeerGone(
                f"No sender of weights answered at {host}:{port} within {seconds:g} s; check that "
                "it runs and that the address is right"
            ) from error

    def close(self) -> None:
        """Let nobody connect any more. The store itself ends with the last reference to it."""
        if self._gate is not None:
            self._gate.close()

    def post(self, key: str, message: Message) -> None:
        """Store a message under ``key``.

        Raises:
            PeerGone: the sender is gone.
        """
        try:
            self.store.set(key, json.dumps(message))
        except dist.DistError as error:
            raise self._gone(f"{key!r} could not be posted") from error

    def read(self, key: str, deadline: Deadline, what: str) -> Message:
        """Wait for the message under ``key``; errors call it ``what``.

        Raises:
            TimeoutError: it was not posted before the deadline.
            PeerGone: the sender is gone.
        """
        try:
            self.store.wait([key], deadline.left())
            return json.loads(self.store.get(key))
        except dist.DistStoreError as error:
            raise TimeoutError(f"Waited {deadline.seconds:g} s for {what}") from error
        except dist.DistError as error:
            raise self._gone(f"waited for {what}") from error

    def forget(self, prefix: str, *, but: Container[str] = ()) -> None:
        """Delete the messages whose keys start with ``prefix``, except the keys in ``but``."""
        for key in self.store.list_keys():
            if key.startswith(prefix) and key not in but:
                self.store.delete_key(key)

    def ask(self, queue: str, message: Message) -> None:
        """Append a message to a queue.

        Raises:
            PeerGone: the sender is gone.
        """
        try:
            self.store.queue_push(queue, json.dumps(message))
        except dist.DistError as error:
            raise self._gone(f"{queue!r} could not be posted") from error

    def next_asked(self, queue: str) -> bytes | None:
        """Remove and return the first message of a queue, undecoded; None if the queue is empty."""
        try:
            return self.store.queue_pop(queue, False)
        except dist.QueueEmptyError:
            return None

    def _gone(self, doing: str) -> PeerGone:
        return PeerGone(f"The sender at {self.host}:{self.port} is gone: {doing}")
