"""Messages between the sender and its receivers: small JSON values by key, in a ``TCPStore`` that
the sender serves. Every wait has a deadline, and its error names what was waited for.

The store has no password. Use it on a private network, like the other ports of torch.
"""

import json
import socket
from collections.abc import Container
from typing import Any

import torch.distributed as dist

from kimi_core.weights.broadcast.transport import Deadline

Message = dict[str, Any]
CONNECT_S = 30.0


class PeerGone(ConnectionError):
    """The sender, which serves the messages, cannot be reached."""


class Mailbox:
    """Messages by key; each is posted once. Not thread-safe."""

    def __init__(self, store: dist.TCPStore) -> None:
        self.store = store

    @classmethod
    def serve(cls, host: str) -> "Mailbox":
        """Serve messages on a free port of ``host``, and on no other address."""
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=Deadline.after(CONNECT_S).left(),
            master_listen_fd=listener.detach(),
        )
        return cls(store)

    @classmethod
    def connect(cls, host: str, port: int, *, seconds: float = CONNECT_S) -> "Mailbox":
        """Connect to the messages that another process serves.

        Raises:
            PeerGone: nobody answers within ``seconds``.
        """
        limit = Deadline.after(seconds).left()
        try:
            return cls(
                dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
            )
        except dist.DistError as error:
            raise PeerGone(
                f"No sender of weights answered at {host}:{port} within {seconds:g} s; check that "
                "it runs and that the address is right"
            ) from error

    @property
    def port(self) -> int:
        return self.store.port

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
        return PeerGone(f"The sender at {self.store.host}:{self.port} is gone: {doing}")
