"""Prompts of a JSONL file, which stay in the file until they are drawn."""

import json
import math
import os
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core.config import PromptsConfig
from kimi_core.prompts.columns import Columns
from kimi_core.prompts.jsonl import PROMPT_KEYS, Place, lines_in, plain_records, prompt_in
from kimi_core.prompts.many import Facts, bytes_of, checksum, gather, joined
from kimi_core.prompts.messages import chat_prompts
from kimi_core.types import Prompt

BLOCK = 1000
"""Lines that are read at a time."""


class PromptFile:
    """A file that is read and checked once, and then stays open. Any thread may ask for prompts.

    Raises:
        ValueError: as ``read_prompts``, or as ``chat_prompts``.
    """

    def __init__(self, path: Path, config: PromptsConfig) -> None:
        self._path, self._config = path, config
        self._columns = Columns(config.fields, config.template)
        self._as_it_is = not (config.chat or config.system or self._columns)
        self._is_plain = self._as_it_is
        """Whether `plain_records` has read all of it."""
        starts, checksums = array("q"), array("I")
        facts = []
        lines = lines_in(path, PROMPT_KEYS)
        while block := list(islice(lines, BLOCK)):
            facts.append(self._facts(len(starts), block))
            starts.extend(offset for offset, _, _ in block)
            checksums.extend(zlib.crc32(line) for _, _, line in block)
        self.facts = joined(facts)
        self._checksums = np.frombuffer(checksums, np.uint32)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._starts = np.array([*starts, os.fstat(self._file).st_size])

    def __len__(self) -> int:
        return len(self._checksums)

    def prompt(self, row: int) -> Prompt:
        """One prompt. Errors as of `prompts`."""
        start, behind = int(self._starts[row]), int(self._starts[row + 1])
        line, _, _ = os.pread(self._file, behind - start, start).partition(b"\n")
        if zlib.crc32(line) != self._checksums[row]:
            raise self._changed(row)
        return self._prompt(row, line, row + 1)

    def prompts(self, rows: np.ndarray) -> Iterator[Prompt]:
        """The prompts of ``rows``, int64 ``[n]``, in ascending order.

        Raises:
            ValueError: the file has changed since it was read first.
        """
        for some, lines in self._blocks(rows):
            for row, line in zip(some.tolist(), lines, strict=True):
                yield self._prompt(row, line, row + 1)

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        """The texts of ``rows``, and errors, as of `prompts`."""
        if not self._is_plain:
            yield from (prompt.text for prompt in self.prompts(rows))
            return
        for _, lines in self._blocks(rows):
            for record in json.loads(b"[" + b",".join(lines) + b"]"):
                yield record["prompt"]

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """Some of the rows, and their lines, until all were given."""
        for at in range(0, len(rows), BLOCK):
            some = rows[at : at + BLOCK]
            first, behind = int(self._starts[some[0]]), int(self._starts[some[-1] + 1])
            whole = os.pread(self._file, behind - first, first) + b"\n"
            starts = (self._starts[some] - first).tolist()
            lines = [whole[start : whole.find(b"\n", start)] for start in starts]
            changed = np.array([*map(zlib.crc32, lines)], np.uint32) != self._checksums[some]
            if changed.any():
                raise self._changed(int(some[changed][0]))
            yield some, lines

    def _changed(self, row: int) -> ValueError:
        return ValueError(
            f"{self._path} has changed since this run began: prompt {row} is another one now. Put "
            "the file back and resume the run, or start another run"
        )

    def _prompt(self, row: int, line: bytes, number: int) -> Prompt:
        prompt = prompt_in(line, row, Place(self._path, number), self._columns)
        if not (self._config.chat or self._config.system):
            return prompt
        (prompt,) = chat_prompts([prompt], self._config)
        return prompt

    def _facts(self, first: int, block: Sequence[tuple[int, int, bytes]]) -> Facts:
        lines = [line for _, _, line in block]
        records = plain_records(lines) if self._as_it_is else None
        if records is None:
            self._is_plain = False
            rows = enumerate(block, first)
            return gather(self._prompt(row, line, number) for row, (_, number, line) in rows)
        return _facts_of_records(first, records)


def _facts_of_records(first: int, records: Sequence[dict[str, Any]]) -> Facts:
    """What ``gather`` finds of plain records, which need not become prompts for it."""
    texts = [record["prompt"] for record in records]
    answers = [record["answer"] for record in records]
    measured = [record.get("difficulty") for record in records]
    problems = [record.get("problem", text) for record, text in zip(records, texts, strict=True)]
    problems = [one if isinstance(one, str) else json.dumps(one) for one in problems]
    return Facts(
        np.arange(first, first + len(records)),
        np.array([math.nan if one is None else one for one in measured], np.float64),
        np.array([*map(hash, problems)]),
        np.array([*map(checksum, texts, answers)], np.uint32),
        np.array([*map(bytes_of, texts)]),
    )
