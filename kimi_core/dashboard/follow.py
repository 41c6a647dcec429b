"""Reads a JSONL file that another process appends to, from where the last read stopped."""

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO


class Follower:
    """The records of a JSONL file. It reads each byte once, as long as the file only grows.

    ``--resume`` of a run replaces the file by one that lacks the last lines. The follower sees this
    by the file's identity, its size, or the last line that it read, and starts over under a new
    ``epoch``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epoch = 0
        """How often the file was replaced."""
        self.records: list[dict[str, Any]] = []
        self.broken = 0
        """Whole lines that are not a JSON object."""
        self._offset = 0
        self._identity = (0, 0)
        self._last = b""
        self._lock = Lock()

    def read(self) -> list[dict[str, Any]]:
        """Every record so far. A last line without its line feed waits for the rest of it.

        Raises:
            OSError: the file is there and cannot be read.
        """
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    self._check(file)
                    file.seek(self._offset)
                    new = file.read()
            except FileNotFoundError:
                self._start_over((0, 0))
                return []
            self._take(new[: new.rfind(b"\n") + 1])
            return list(self.records)

    def _check(self, file: BinaryIO) -> None:
        """Start over if this is not the file that was read before."""
        found = os.fstat(file.fileno())
        identity = (found.st_dev, found.st_ino)
        file.seek(self._offset - len(self._last))
        last = file.read(len(self._last))
        if identity != self._identity or found.st_size < self._offset or last != self._last:
            self._start_over(identity)

    def _start_over(self, identity: tuple[int, int]) -> None:
        if self._offset:
            self.epoch += 1
        self.records, self.broken, self._offset, self._last = [], 0, 0, b""
        self._identity = identity

    def _take(self, whole: bytes) -> None:
        for line in whole.split(b"\n")[:-1]:
            record = parse_object(line)
            if record is None:
                self.broken += 1
            else:
                self.records.append(record)
            self._last = line + b"\n"
        self._offset += len(whole)


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none. NaN and Infinity are not JSON."""
    try:
        found = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
