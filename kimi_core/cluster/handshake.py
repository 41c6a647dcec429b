"""How a worker and the master of a run make sure of each other, over a TCP connection.

Both send ``MAGIC`` and 32 random bytes. Then the worker, and after it the master, sends a proof
that it knows the token: HMAC-SHA256 of its role, its own random bytes and the other's. The token
itself never travels. What follows is neither encrypted nor signed: use a network whose hosts you
trust.
"""

import hmac
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

MAGIC = b"kimi_core worker 2\n"
LEAST = 16
"""Bytes of the shortest token."""

GREET_S = 5.0
"""Seconds for each message of a greeting."""

AT_ONCE = 16
"""Connections that may be greeted at the same time; more are closed."""

KERNEL_SHARE = 0.75
"""The kernel ends a silent connection after this share of ``silent_s``: before a publication, which
waits for all of it, is over. After a cut of 3 s, TCP needs up to 6.2 s."""

KEEPALIVE_S = 2
"""Seconds without a packet after which a host is asked whether it is still there."""


log = logging.getLogger(__name__)


class Refused(ConnectionError):
    """The other side does not know the token, or is no kimi_core."""


def read_token(path: str | Path) -> bytes:
    """The token in a file.

    Raises:
        ValueError: there is no such file, or the token is short.
    """
    try:
        token = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"Cannot read the token in {path or 'no file'}: {error}; make one with "
            "`openssl rand -hex 32`, and copy it to every host"
        ) from error
    if len(token) < LEAST:
        raise ValueError(
            f"The token in {path} has {len(token)} characters, and {LEAST} are the least; make one "
            "with `openssl rand -hex 32`"
        )
    return token


def address_of(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
        ValueError: the text is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no address: write HOST:PORT, such as 10.0.0.1:29500")
    return host, int(port)


def limit(connection: socket.socket, silent_s: float) -> None:
    """Have the kernel end a connection whose other end does not answer, within ``silent_s``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # macOS lacks some of these.
        with suppress(AttributeError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_S)
    with suppress(AttributeError):
        milliseconds = int(KERNEL_SHARE * silent_s * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def waits(connection: socket.socket, seconds: float) -> None:
    """Limit each read and each write of a blocking socket; after that they raise OSError."""
    connection.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        given = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, option, given)


def greet(connection: Connection, token: bytes, *, is_master: bool) -> None:
    """Make sure that the other side knows the token.

    Raises:
        Refused: it does not.
        OSError, EOFError: it went away, or was too slow.
    """
    own, other = (b"master", b"worker") if is_master else (b"worker", b"master")
    mine = secrets.token_bytes(32)
    connection.send_bytes(MAGIC + mine)
    hello = connection.recv_bytes(len(MAGIC) + 32)
    if not hello.startswith(MAGIC) or len(hello) != len(MAGIC) + 32:
        raise Refused("the other side is another version of kimi_core, or no kimi_core at all")
    theirs = hello[len(MAGIC) :]
    if not is_master:
        connection.send_bytes(_proof(token, own, mine, theirs))
    try:
        given = connection.recv_bytes(32)
    except EOFError as error:
        raise Refused("the other side does not accept this token") from error
    if not hmac.compare_digest(given, _proof(token, other, theirs, mine)):
        raise Refused("the other side has another token")
    if is_master:
        connection.send_bytes(_proof(token, own, mine, theirs))


def admit(
    server: socket.socket,
    token: bytes,
    welcome: Callable[[socket.socket, Connection], None],
    *,
    silent_s: float,
) -> None:
    """Greet all who connect, in threads, until the server's socket is shut down. Returns at once.

    Args:
        welcome: called in a thread with each connection that knows the token, and with a
            ``Connection`` over it; both are closed afterwards. Reads and writes are limited to
            ``GREET_S``.
        silent_s: as for ``limit``.
    """
    places = threading.BoundedSemaphore(AT_ONCE)

    def let_in(connection: socket.socket, host: str) -> None:
        try:
            with connection, closing(Connection(os.dup(connection.fileno()))) as channel:
                limit(connection, silent_s)
                waits(connection, GREET_S)
                greet(channel, token, is_master=True)
                welcome(connection, channel)
        except (Refused, ValueError) as error:
            log.warning("A connection from %s was refused: %s", host, error)
        except (OSError, EOFError) as error:
            log.warning("A connection from %s ended before it was greeted: %r", host, error)
        finally:
            places.release()

    def accept() -> None:
        while True:
            try:
                connection, (host, *_) = server.accept()
            except OSError:
                return
            if not places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=let_in, args=(connection, host), daemon=True).start()

    threading.Thread(target=accept, name="cluster-admit", daemon=True).start()


def _proof(token: bytes, role: bytes, own: bytes, other: bytes) -> bytes:
    return hmac.digest(token, role + own + other, "sha256")
