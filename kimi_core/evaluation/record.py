"""Judged answers in an append-only JSONL file that survives a crash at any instant.

There is a line for each draw, with its settings, and a line for each of its prompts::

    {"draw": "solve", "settings": {"samples": 10, "temperature": 1.0, ...}}
    {"draw": "solve", "prompt": "5f1c...", "answers": [{"text": "...", "tokens": 12, ...}, ...]}

A line is forced to disk before the next one is written. One that a crash has torn is the last one,
has no line feed, and is cut off when the file is opened again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_core.types import EndReason, Prompt

RIGHT = 0.5
"""An answer with a higher reward is right."""


@dataclass(frozen=True)
class Answer:
    """One response of a model, judged."""

    text: str
    tokens: int
    """Length, with the token that ended it."""
    end: EndReason
    reward: float | None
    """The reward function's result; None: no verdict could be reached."""

    @property
    def is_right(self) -> bool:
        """Whether it has a verdict, and that is nearer to 1 than to 0."""
        return self.reward is not None and self.reward > RIGHT


def key_of(prompt: Prompt) -> str:
    """Names a prompt by what is asked and how it is judged, wherever it stands in a file."""
    messages = [dict(message) for message in prompt.messages]
    content = [prompt.text, messages, prompt.answer, prompt.tags.get("tests", "")]
    content += [image.digest for image in prompt.images]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


class Record:
    """The answers of one file. One process at a time may have it open; ``close`` releases it.

    Raises:
        ValueError: another process has the file open, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"Another process writes {path}; wait until it has ended") from None
        self._settings: dict[str, dict[str, Any]] = {}
        self._places: dict[str, dict[str, int]] = {}
        try:
            self._index()
        except ValueError:
            self._file.close()
            raise

    def begin(self, draw: str, settings: Mapping[str, Any]) -> None:
        """Open a draw, or go on with it.

        Raises:
            ValueError: it was begun with other settings.
        """
        if draw not in self._settings:
            self._append({"draw": draw, "settings": dict(settings)})
            self._settings[draw], self._places[draw] = dict(settings), {}
        before = self._settings[draw]
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            raise ValueError(
                f"{self.path} has answers that were drawn with "
                + ", ".join(f"{key} = {before.get(key)!r}" for key in changed)
                + ", and asked for is "
                + ", ".join(f"{key} = {settings.get(key)!r}" for key in changed)
                + ": put the settings back to go on, or write to another folder"
            )

    def add(self, draw: str, key: str, answers: Sequence[Answer]) -> None:
        """Append all answers to one prompt, and force them to disk.

        Raises:
            OSError: the disk is full, or has another fault.
        """
        line = {"draw": draw, "prompt": key, "answers": [asdict(one) for one in answers]}
        self._places[draw][key] = self._append(line)

    def has(self, draw: str, key: str) -> bool:
        """Whether the answers to this prompt are there."""
        return key in self._places.get(draw, ())

    def count(self, draw: str) -> int:
        """Prompts whose answers are there."""
        return len(self._places.get(draw, ()))

    def answers(self, draw: str, key: str) -> list[Answer]:
        """The answers to one prompt, read from the file."""
        with self.path.open("rb") as file:
            file.seek(self._places[draw][key])
            return [Answer(**one) for one in json.loads(file.readline())["answers"]]

    def close(self) -> None:
        """Release the file. Safe to call twice."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> int:
        """Write a line and return where it begins."""
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place = os.fstat(self._file.fileno()).st_size
        written = self._file.write(content)
        if written < len(content):
            os.ftruncate(self._file.fileno(), place)
            raise OSError(
                f"{self.path} took {written} of {len(content)} bytes: the disk is full; make room "
                "and give the same command again"
            )
        os.fsync(self._file.fileno())
        return place

    def _index(self) -> None:
        place = 0
        for number, line in enumerate(self._lines(), 1):
            try:
                found = json.loads(line)
                if "settings" in found:
                    self._settings[found["draw"]] = found["settings"]
                    self._places[found["draw"]] = {}
                else:
                    [Answer(**one) for one in found["answers"]]
                    self._places[found["draw"]][found["prompt"]] = place
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({type(error).__name__}: {error}): "
                    "delete the line, and its prompt is answered again"
                ) from None
            place += len(line)

    def _lines(self) -> Iterator[bytes]:
        """The whole lines; what follows the last of them is cut off."""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file.fileno(), file.tell() - len(line))
                    return
                yield line
