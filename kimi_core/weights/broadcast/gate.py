"""A token for torch's store, which asks for none by itself.

1. The sender's store listens on the loopback interface alone. Other hosts reach its gate, where
   each connection proves that it knows the token (``cluster/handshake.py``).
2. The gate then joins the connection to the store. Bytes pass as they are.
3. On the receiver's host a port of the loopback interface is joined to the connection to the gate.
   The receiver's store connects there. The port takes one connection, and is closed.

The ranks of a trainer on several hosts meet behind such a gate, too.
"""

import os
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from kimi_core.cluster.handshake import GREET_S, admit, greet, limit, waits

LOOPBACK = "127.0.0.1"

SILENT_S = 60.0
"""Seconds after which the kernel ends a connection whose other end does not answer."""

PIECE = 1 << 16
"""Bytes that are passed on at once."""


class Gate:
    """Lets those through to a port of the loopback interface who know the token.

    Args:
        host: address at which to listen, on a free port.
        inner: the port behind the gate.
    """

    def __init__(self, host: str, inner: int, token: bytes) -> None:
        self._server = socket.create_server((host, 0))
        self.port: int = self._server.getsockname()[1]
        self._inner = inner
        admit(self._server, token, self._welcome, silent_s=SILENT_S)

    def close(self) -> None:
        """Let nobody in any more. Connections end with the store. Safe to call twice."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _welcome(self, connection: socket.socket, _: Connection) -> None:
        waits(connection, 0)
        join(connection.dup(), socket.create_connection((LOOPBACK, self._inner)))


def tunnel(address: tuple[str, int], token: bytes, *, seconds: float, again: bool = False) -> int:
    """A port of the loopback interface that leads through the gate at ``address``, once.

    Args:
        again: the port stays open, for a store that connects more than once.

    Raises:
        Refused: the gate has another token.
        OSError: it did not answer within ``seconds``.
    """
    outer = _pass(address, token, seconds)
    server = socket.create_server((LOOPBACK, 0))
    server.settimeout(seconds)

    def take() -> None:
        with server:
            try:
                inner, _ = server.accept()
            except OSError:  # Nobody came.
                outer.close()
                return
            inner.settimeout(None)
            join(inner, outer)
            server.settimeout(None)
            while again:
                inner, _ = server.accept()
                try:
                    join(inner, _pass(address, token, seconds))
                except OSError:  # The gate is closed.
                    inner.close()

    threading.Thread(target=take, name="weights-tunnel", daemon=True).start()
    port: int = server.getsockname()[1]
    return port


def _pass(address: tuple[str, int], token: bytes, seconds: float) -> socket.socket:
    """A connection through the gate. Raises: as ``tunnel``."""
    outer = socket.create_connection(address, timeout=seconds)
    limit(outer, SILENT_S)
    waits(outer, GREET_S)
    channel = Connection(os.dup(outer.fileno()))
    try:
        greet(channel, token, is_master=False)
    except BaseException:
        outer.close()
        raise
    finally:
        channel.close()
    waits(outer, 0)
    return outer


def join(one: socket.socket, other: socket.socket) -> None:
    """Pass all bytes from each to the other, in threads, until one ends; then close both."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                target.sendall(piece)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def both_ways() -> None:
        back = threading.Thread(target=pass_on, args=(other, one), daemon=True)
        back.start()
        with one, other:
            pass_on(one, other)
            back.join()

    for end in (one, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=both_ways, name="weights-join", daemon=True).start()
