"""Messages from a rollout worker to the fleet: segments as columns, without one object a segment.

A message is a header and its columns, end to end, little-endian:

| bytes | what |
|---|---|
| 4 × int32 | kind, number of the call, segments n, tokens t |
| 2 × int64 | policy version, decode steps so far |
| n × int64 | trajectory ids |
| t × int32, t × float32 | token ids, log-probs |
| (n + 1) × int32 | ``cu_seqlens`` |
| n × uint8 | end reasons, as numbers of ``END_REASONS`` |

A message of the kind ``FAULT`` has UTF-8 text in place of columns. Nothing here is unpickled.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_core.types import END_REASONS, Segment, SegmentColumns

HELLO, READY, SEGMENTS, FAULT = range(4)
"""``HELLO``: the process can be told what to do. ``READY``: it serves the version in the header.
``SEGMENTS``: what the header's call has made; with no segments the message is a sign of life."""

HEADER = struct.Struct("<4i2q")

_I8, _I4, _F4, _U1 = (np.dtype(kind) for kind in ("<i8", "<i4", "<f4", "u1"))


@dataclass(frozen=True)
class Message:
    """What a worker says."""

    kind: int
    call: int
    policy_version: int
    steps: int
    """Decode steps since the worker's process began."""
    segments: SegmentColumns | None = None
    """None: there are none."""
    text: str = ""
    """What went wrong."""


def packed(
    kind: int,
    *,
    call: int = 0,
    policy_version: int = 0,
    steps: int = 0,
    segments: Sequence[Segment] = (),
    text: str = "",
) -> bytes:
    """The bytes of a message."""
    if not segments:
        return HEADER.pack(kind, call, 0, 0, policy_version, steps) + text.encode()
    columns = SegmentColumns.of(segments)
    n, t = len(columns), len(columns.token_ids)
    return b"".join(
        (
            HEADER.pack(kind, call, n, t, policy_version, steps),
            columns.trajectory_ids.astype("<i8").tobytes(),
            columns.token_ids.astype("<i4").tobytes(),
            columns.logprobs.astype("<f4").tobytes(),
            columns.cu_seqlens.astype("<i4").tobytes(),
            columns.end_reasons.tobytes(),
        )
    )


def unpacked(message: bytes, worker: int) -> Message:
    """The message in these bytes; its columns are views of them.

    Raises:
        ValueError: the bytes are no message.
    """
    if len(message) < HEADER.size:
        raise ValueError(f"a message of {len(message)} bytes has no header")
    kind, call, n, t, version, steps = HEADER.unpack_from(message)
    if kind == FAULT or not n:
        text = message[HEADER.size :].decode(errors="replace")
        return Message(kind, call, version, steps, text=text)
    if min(n, t) < 0 or HEADER.size + 8 * t + 13 * n + 4 != len(message):
        raise ValueError(f"a message of {len(message)} bytes claims {n} segments and {t} tokens")
    columns, start = [], HEADER.size
    for dtype, size in (_I8, n), (_I4, t), (_F4, t), (_I4, n + 1), (_U1, n):
        columns.append(np.frombuffer(message, dtype, size, start))
        start += dtype.itemsize * size
    ids, tokens, logprobs, cu_seqlens, reasons = columns
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != t or reasons.max() >= len(END_REASONS):
        raise ValueError(f"the {n} segments of a message do not share its {t} tokens")
    if not np.isfinite(logprobs).all():
        raise ValueError("a log-prob is not finite")
    versions = np.full(n, version, np.int32)
    segments = SegmentColumns(ids, tokens, logprobs, cu_seqlens, versions, reasons, worker)
    return Message(kind, call, version, steps, segments=segments)
