"""What an evaluation has so far, in a file, so that one that is killed goes on.

The first line says which evaluation it is. Then comes a line for each response that has ended and
for each verdict. Every line holds its checksum; from the first that is damaged or torn on, nothing
is believed. Lines survive the death of the process as soon as they are written. They are not forced
to disk: after the death of the machine, what is missing is answered a second time.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core import _C
from kimi_core.types import Score

Key = tuple[str, int]
"""``greedy`` or ``sampled``, and the place of the prompt."""


class Progress:
    """Responses and verdicts of the one evaluation that ``about`` describes, in the file ``path``.

    What the file holds of another evaluation is dropped.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.responses: dict[Key, np.ndarray] = {}
        """Token ids of the responses that have ended, int32 ``[n]``."""
        self.verdicts: dict[Key, Score] = {}
        size = self._read(dict(about))
        self._file = path.open("r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._add(dict(about))

    def ended(self, key: Key, token_ids: np.ndarray) -> None:
        """Keep a response that has ended. Raises OSError."""
        self.responses[key] = token_ids
        self._add({"response": key, "token_ids": token_ids.tolist()})

    def judged(self, key: Key, score: Score) -> None:
        """Keep a verdict. Raises OSError."""
        self.verdicts[key] = score
        self._add({"verdict": key, **asdict(score)})

    def close(self) -> None:
        """Close the file, which stays. Safe to call twice."""
        self._file.close()

    def remove(self) -> None:
        """Close and remove the file: the evaluation has been reported."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _add(self, record: Mapping[str, Any]) -> None:
        line = sealed_line(record).encode()
        if self._file.write(line) != len(line):
            raise OSError(28, "No space left on device", str(self.path))

    def _read(self, about: Mapping[str, Any]) -> int:
        """Take what the file holds of this evaluation; return its length in bytes."""
        size = 0
        with suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines(keepends=True):
                record = unsealed(line)
                if record is None or (size == 0 and record != json.loads(json.dumps(about))):
                    break
                try:
                    self._take(record)
                except (KeyError, OverflowError, TypeError, ValueError):
                    break  # The checksum of something else happened to match.
                size += len(line)
        return size

    def _take(self, record: dict[str, Any]) -> None:
        if "response" in record:
            which, at = record["response"]
            self.responses[which, at] = np.array(record["token_ids"], np.int32)
        elif "verdict" in record:
            which, at = record.pop("verdict")
            self.verdicts[which, at] = Score(**record)


def sealed_line(record: Mapping[str, Any]) -> str:
    """A line of JSON that holds its checksum; ``unsealed`` reads it."""
    text = json.dumps(dict(record), separators=(",", ":"))
    return f"{_C.crc32c(text.encode()):08x} {text}\n"


def unsealed(line: bytes) -> dict[str, Any] | None:
    """The record of a line that ``sealed_line`` wrote; None: it is damaged, torn, or another's.

    >>> line = sealed_line({"a": 1}).encode()
    >>> unsealed(line)
    {'a': 1}
    >>> unsealed(line.replace(b"1", b"3")), unsealed(line[:-1])
    (None, None)
    """
    crc, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or crc != f"{_C.crc32c(text[:-1]):08x}".encode():
        return None
    with suppress(ValueError, RecursionError):
        record = json.loads(text)
        return record if isinstance(record, dict) else None
    return None
