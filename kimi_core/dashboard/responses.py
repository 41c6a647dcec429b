"""Finds responses in ``trajectories/NNNNNN.jsonl`` by byte offset, without reading their tokens.

A line of 2,000 tokens has 70 kB, of which numbers per token are most. They stand last, behind
``"prompt_ids"``, so the index parses only what stands before. The bytes ``,"prompt_ids":[`` cannot
be part of a text: in a JSON string every quotation mark has a backslash before it.
"""

import mmap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_core.dashboard.follow import parse_object
from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.pictures import is_digest

TOKENS_BEGIN = b',"prompt_ids":['

TEXT_SHOWN = 20_000
"""Characters of a response on the page of its group; its own page has all of it."""

PROMPT_SHOWN = 200
"""Characters of a prompt on the page of an iteration."""

COLUMNS = ("trajectory_id", "group_id", "reward", "correctness", "advantage", "end_reason")


@dataclass(frozen=True)
class Place:
    """Where a response stands in its file, and what the pages of iteration and group sort by."""

    offset: int
    size: int
    facts: dict[str, Any]


class IterationFile:
    """One ``trajectories/NNNNNN.jsonl``, indexed when it is opened.

    Args:
        path: the file; a run writes it whole. Lines that are damaged or cut are counted, not shown.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        self.iteration = iteration
        self.broken = 0
        self.places: dict[int, Place] = {}
        self._groups: dict[int, list[int]] = defaultdict(list)
        self._prompts: dict[int, tuple[int, str]] = {}
        for offset, line in _lines(path):
            head = _head(line)
            try:
                self._take(Place(offset, len(line), self._facts(head)), head)
            except (KeyError, TypeError, ValueError):  # Another form than a run writes.
                self.broken += 1

    def summary(self) -> dict[str, Any]:
        """What the page of an iteration shows: a column for each fact, and the groups' prompts."""
        found = [place.facts for place in self.places.values()]
        ages: dict[int, int] = defaultdict(int)
        for facts in found:
            for age, tokens in facts["ages"]:
                ages[age] += tokens
        return {
            "iteration": self.iteration,
            "columns": {
                name: [facts[name] for facts in found] for name in (*COLUMNS, "tokens", "age")
            },
            "prompts": {group: list(prompt) for group, prompt in self._prompts.items()},
            "ages": sorted(ages.items()),
            "broken": self.broken,
        }

    def group(self, group_id: int) -> dict[str, Any]:
        """The responses of a group without their tokens, long texts cut.

        Raises:
            Missing: the file has no such group.
        """
        if group_id not in self._groups:
            raise Missing(f"Iteration {self.iteration} has no group {group_id}")
        records = [_head(self._line(one)) for one in self._groups[group_id]]
        for record in records:
            record["images"] = _digests(record)
            text = record.get("response", "")
            record["response_characters"] = len(text)
            record["response"] = text[:TEXT_SHOWN]
        ids = list(self._groups)
        return {
            "iteration": self.iteration,
            "group_id": group_id,
            "responses": records,
            "neighbours": _neighbours(ids, group_id),
        }

    def response(self, trajectory_id: int) -> dict[str, Any]:
        """A response with everything that the file has of it.

        Raises:
            Missing: the file has no such response.
        """
        if trajectory_id not in self.places:
            raise Missing(f"Iteration {self.iteration} has no response {trajectory_id}")
        record = parse_object(self._line(trajectory_id)) or {}
        mates = self._groups[self.places[trajectory_id].facts["group_id"]]
        shown = {"images": _digests(record), "neighbours": _neighbours(mates, trajectory_id)}
        return record | shown

    def _take(self, place: Place, head: dict[str, Any]) -> None:
        trajectory, group = place.facts["trajectory_id"], place.facts["group_id"]
        self.places[trajectory] = place
        self._groups[group].append(trajectory)
        if group not in self._prompts:
            self._prompts[group] = (head.get("prompt_id", -1), str(head["prompt"])[:PROMPT_SHOWN])

    def _facts(self, head: dict[str, Any]) -> dict[str, Any]:
        """Ages are those at the training: version n − 1 sampled the fresh tokens of iteration n."""
        newest = self.iteration - 1
        ages = [(newest - version, tokens) for version, tokens in head["versions"]]
        facts = {name: head.get(name) for name in COLUMNS}
        facts["tokens"] = sum(tokens for _, tokens in ages)
        facts["age"] = max((age for age, _ in ages), default=0)
        facts["ages"] = ages
        return facts

    def _line(self, trajectory_id: int) -> bytes:
        place = self.places[trajectory_id]
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of every line that ends with a line feed; an empty one for a cut end."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = 0
            while (end := content.find(b"\n", start)) >= 0:
                yield start, content[start:end]
                start = end + 1
            if start < size:
                yield start, b""


def _head(line: bytes) -> dict[str, Any]:
    """The record without its tokens; empty for a line that is none."""
    end = line.find(TOKENS_BEGIN)
    return parse_object(line if end < 0 else line[:end] + b"}") or {}


def _digests(record: dict[str, Any]) -> list[str]:
    """The images of a prompt; what names none is left out."""
    found = record.get("images", [])
    return [one for one in found if is_digest(one)] if isinstance(found, list) else []


def _neighbours(ids: list[int], one: int) -> list[int | None]:
    """The ids before and after ``one``; None at an end."""
    at = ids.index(one)
    return [ids[at - 1] if at else None, ids[at + 1] if at + 1 < len(ids) else None]
