"""Messages from the fleet to a worker of another host. Nothing here is pickled or unpickled.

A message begins with one byte, its kind. Numbers are little-endian:

| kind | what follows |
|---|---|
| ``SERVE`` | JSON: the version |
| ``BEGIN`` | JSON: ``[call, most_steps, sampling]`` |
| ``FEED`` | 2 × int32: requests n, tokens t; then the columns below, end to end |
| ``STOP``, ``END`` | nothing; ``END``: the run is over |
| ``IMAGES`` | safetensors: the pixels of images under ``NUMBER/NAME``, for the requests after it |

Columns of ``FEED``: n × int64 trajectory ids; n × int32 each of prompt lengths, budgets, remaining;
(n + 1) × int32 ``cu_seqlens``; t × int32 token ids.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save

from kimi_core.models.processors import Pixels
from kimi_core.types import Request, Sampling, StopStrings

SERVE, BEGIN, FEED, STOP, END, IMAGES = range(6)

_COUNTS = struct.Struct("<2i")
_FIELDS = ("temperature", "seed", "repeat_window", "repeat_count", "stream_tokens")


def packed(question: tuple[Any, ...]) -> bytes:
    """The bytes of what a ``ConnectedWorker`` asks."""
    match question:
        case ("serve", int(version)):
            return bytes([SERVE]) + json.dumps(version).encode()
        case ("begin", int(call), Sampling() as sampling, int(most_steps)):
            fields = {name: getattr(sampling, name) for name in _FIELDS}
            fields["stop_token_ids"] = sorted(sampling.stop_token_ids)
            fields["stop_strings"] = sampling.stop_strings.strings if sampling.stop_strings else []
            return bytes([BEGIN]) + json.dumps([call, most_steps, fields]).encode()
        case ("feed", list(requests)):
            return bytes([FEED]) + _columns(requests)
        case ("images", dict(images)):
            return bytes([IMAGES]) + save(_flat(images))
        case ("stop",):
            return bytes([STOP])
        case ("end",):
            return bytes([END])
    raise ValueError(f"there is no message for {question[0]!r}")


def unpacked(message: bytes, text: Callable[[Sequence[int]], str] | None = None) -> tuple[Any, ...]:
    """The question in these bytes.

    Args:
        text: how tokens become text, for stop strings; None: not known here.

    Raises:
        ValueError: they are none, or have stop strings without ``text``.
    """
    kind, rest = message[0] if message else -1, message[1:]
    if kind == SERVE:
        return "serve", int(json.loads(rest))
    if kind == BEGIN:
        call, most_steps, fields = json.loads(rest)
        ends = frozenset(map(int, fields.pop("stop_token_ids")))
        stop = _stop(fields.pop("stop_strings"), text)
        sampling = Sampling(stop_token_ids=ends, stop_strings=stop, **fields)
        return "begin", int(call), sampling, int(most_steps)
    if kind == FEED:
        return "feed", _requests(rest)
    if kind == IMAGES:
        return "images", _by_number(rest)
    if kind in (STOP, END):
        return ("stop",) if kind == STOP else ("end",)
    raise ValueError(f"a message of {len(message)} bytes has the unknown kind {kind}")


def _stop(
    strings: Sequence[str], text: Callable[[Sequence[int]], str] | None
) -> StopStrings | None:
    if not strings:
        return None
    if text is None:
        raise ValueError(f"stop strings {strings} without a tokenizer")
    return StopStrings(tuple(strings), text)


def _flat(images: Mapping[int, Pixels]) -> dict[str, Any]:
    named = [(f"{n}/{name}", value) for n, one in images.items() for name, value in one.items()]
    return {key: value.contiguous() for key, value in named}


def _by_number(message: bytes) -> dict[int, Pixels]:
    images: dict[int, dict[str, Any]] = {}
    try:
        for key, value in load(message).items():
            number, _, name = key.partition("/")
            images.setdefault(int(number), {})[name] = value
    except SafetensorError as error:
        raise ValueError(f"a message of {len(message)} bytes has no images: {error}") from error
    return dict(images)


def _columns(requests: list[Request]) -> bytes:
    lengths = [len(one.token_ids) for one in requests]
    numbers = [[one.prompt_length, one.budget, one.remaining] for one in requests]
    return b"".join(
        (
            _COUNTS.pack(len(requests), sum(lengths)),
            np.array([one.trajectory_id for one in requests], "<i8").tobytes(),
            np.array(numbers, "<i4").T.tobytes(),
            np.cumsum([0, *lengths], dtype="<i4").tobytes(),
            *(one.token_ids.astype("<i4").tobytes() for one in requests),
        )
    )


def _requests(message: bytes) -> list[Request]:
    n, t = _COUNTS.unpack_from(message)
    if min(n, t) < 0 or len(message) != _COUNTS.size + 8 * n + 4 * (3 * n + n + 1 + t):
        raise ValueError(f"a message of {len(message)} bytes claims {n} requests, {t} tokens")
    ids = np.frombuffer(message, "<i8", n, _COUNTS.size).tolist()
    rest = np.frombuffer(message, "<i4", offset=_COUNTS.size + 8 * n)
    prompts, budgets, remaining = rest[: 3 * n].reshape(3, n).tolist()
    edges, tokens = rest[3 * n : 4 * n + 1].tolist(), rest[4 * n + 1 :]
    parts = [tokens[start:stop] for start, stop in pairwise(edges)]
    return [Request(*one) for one in zip(ids, parts, prompts, budgets, remaining, strict=True)]
