"""Messages between a pool and its slots: pickled objects on a socket, each after its length.

Both ends are processes of ours. Output of a sandboxed program is only ever bytes in a Result.
``multiprocessing.connection`` does the same, but its imports make a slot a third larger, and there
is one slot for each CPU.
"""

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(end: socket.socket, message: object, timeout_s: float) -> None:
    """Raises TimeoutError, or OSError if the other end has ended."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    end.settimeout(timeout_s)
    end.sendall(_LENGTH.pack(len(data)) + data)


def receive(end: socket.socket, timeout_s: float) -> Any:
    """The next message.

    Raises:
        TimeoutError: no message came within ``timeout_s``.
        EOFError: the other end was closed.
    """
    end.settimeout(timeout_s)
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    return pickle.loads(_exactly(end, length))


def _exactly(end: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = end.recv(min(size, 1 << 20))
        if not part:
            raise EOFError("the other end of the connection is closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
