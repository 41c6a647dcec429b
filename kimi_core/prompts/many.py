"""Prompts in any number: what must be known of each one, and lists that are read when needed.

Up to ``MANY`` prompts are a plain list. More of them are ``ManyPrompts``: those of a JSONL file
stay there (``file.py``), and memory holds 52 bytes for each.
"""

import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, overload

import numpy as np

from kimi_core.types import Prompt

MANY = 20_000
"""Up to this number of prompts, all are kept in memory and tokenized before the run."""


@dataclass(frozen=True)
class Facts:
    """What the whole run must know of each of ``n`` prompts."""

    ids: np.ndarray
    """int64 ``[n]``."""
    difficulty: np.ndarray
    """float64 ``[n]``; NaN if it was not measured."""
    problems: np.ndarray
    """A hash of the ``problem`` tag, or without one of the text and the digests of images, int64
    ``[n]``. It differs from process to process."""
    checksums: np.ndarray
    """CRC-32 of text, digests and answer, uint32 ``[n]``."""
    sizes: np.ndarray
    """Bytes of the text in UTF-8, int64 ``[n]``; -1 for messages and as `bytes_of` says, 0 with
    images."""

    def take(self, rows: np.ndarray) -> "Facts":
        """The facts of some prompts; ``rows`` is int64 ``[m]``."""
        return Facts(*(getattr(self, one.name)[rows] for one in fields(self)))


def joined(parts: Sequence[Facts]) -> Facts:
    """The facts of all parts, in order."""
    names = [one.name for one in fields(Facts)]
    return Facts(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def texts_of(prompts: Sequence[Prompt]) -> Iterator[str]:
    """The texts of all prompts, in order."""
    if isinstance(prompts, ManyPrompts):
        return prompts.texts()
    return (prompt.text for prompt in prompts)


def facts_of(prompts: Sequence[Prompt]) -> Facts:
    """The facts of all prompts, which are in memory already for ``ManyPrompts``."""
    return prompts.facts if isinstance(prompts, ManyPrompts) else gather(prompts)


class Source(Protocol):
    """Where prompts are."""

    def prompt(self, row: int) -> Prompt:
        """One of them."""

    def prompts(self, rows: np.ndarray) -> Iterator[Prompt]:
        """The prompts of ``rows``, int64 ``[n]``, in ascending order."""

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        """Their texts."""


class InMemory:
    """Prompts of a list."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts

    def prompt(self, row: int) -> Prompt:
        return self._prompts[row]

    def prompts(self, rows: np.ndarray) -> Iterator[Prompt]:
        return map(self._prompts.__getitem__, rows.tolist())

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        return (prompt.text for prompt in self.prompts(rows))


class ManyPrompts(Sequence[Prompt]):
    """Prompts that are fetched from their source when they are asked for.

    Args:
        source: where the prompts are.
        facts: those of ``rows``.
        rows: which prompts of the source these are, in ascending order, int64 ``[n]``.
    """

    def __init__(self, source: Source, facts: Facts, rows: np.ndarray) -> None:
        self._source = source
        self._rows = rows
        self.facts = facts

    def take(self, rows: np.ndarray) -> "ManyPrompts":
        """Some of these prompts; ``rows`` is int64 ``[m]``, in ascending order."""
        return ManyPrompts(self._source, self.facts.take(rows), self._rows[rows])

    def texts(self) -> Iterator[str]:
        """The texts alone, in order."""
        return self._source.texts(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self._source.prompt(int(self._rows[index]))

    def __iter__(self) -> Iterator[Prompt]:
        return self._source.prompts(self._rows)


class ById:
    """Finds prompts by their ids.

    >>> ById([Prompt(7, "1+1=", "2"), Prompt(3, "1+2=", "3")])[3].answer
    '3'
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.facts = facts_of(prompts)
        self._sorted = ids = self.facts.ids
        self._order: np.ndarray | None = None
        """Rows in the order of their ids; None: the ids ascend already."""
        if not (ids[:-1] < ids[1:]).all():
            self._order = np.argsort(ids)
            self._sorted = ids[self._order]

    def row(self, prompt_id: int) -> int:
        """The place of a prompt in ``prompts``.

        Raises:
            KeyError: no prompt has this id.
        """
        at = int(np.searchsorted(self._sorted, prompt_id))
        if at == len(self._sorted) or self._sorted[at] != prompt_id:
            raise KeyError(prompt_id)
        return at if self._order is None else int(self._order[at])

    def __getitem__(self, prompt_id: int) -> Prompt:
        return self.prompts[self.row(prompt_id)]


def gather(prompts: Iterable[Prompt]) -> Facts:
    """The facts of prompts, which are looked at once."""
    ids, problems, sizes = array("q"), array("q"), array("q")
    difficulty, checksums = array("d"), array("I")
    for prompt in prompts:
        text, measured = prompt.text, prompt.difficulty
        ids.append(prompt.id)
        difficulty.append(math.nan if measured is None else measured)
        images = "".join(image.digest for image in prompt.images)
        problems.append(hash(prompt.tags.get("problem", text + images)))
        checksums.append(checksum(text + images, prompt.answer))
        sizes.append(-1 if prompt.messages else 0 if images else bytes_of(text))
    return Facts(
        np.frombuffer(ids, np.int64),
        np.frombuffer(difficulty, np.float64),
        np.frombuffer(problems, np.int64),
        np.frombuffer(checksums, np.uint32),
        np.frombuffer(sizes, np.int64),
    )


def checksum(text: str, answer: str) -> int:
    """The CRC-32 by which a resumed run knows what a prompt asks."""
    return zlib.crc32(f"{text}\0{answer}".encode(errors="replace"))


def bytes_of(text: str) -> int:
    """Bytes of a text in UTF-8; -1 if it has none, because it holds half a surrogate pair, or if
    all of it is control characters, for which a tokenizer may have no tokens."""
    if not text.strip(CONTROL):
        return -1
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1


CONTROL = "".join(map(chr, [*range(32), 127]))
"""ASCII control characters."""
