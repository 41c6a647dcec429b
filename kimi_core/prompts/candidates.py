"""Passes over texts that neither are nor contain one of others, faster than by comparing them.

A million texts are compared in blocks. A text is cleaned: lower case, and one space in place of all
white space and punctuation. A text that is another one is the same when both are cleaned. One that
contains another one contains its first words, and with them eight bytes that were chosen to be
rare; numpy looks for these at every byte of a block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

BLOCK = 1000
"""Texts that are cleaned at a time."""

TABLE_BITS = 18

MIX = np.uint64(0x9E3779B97F4A7C15)
"""Spreads eight bytes over a table (multiplicative hashing)."""


class Filter:
    """Looks for texts in others.

    Args:
        wanted: what to look for: texts in lower case, without ``punctuation`` around words.
        words: a text of at least this number of words is looked for inside others, too.
        punctuation: its ASCII characters are treated as white space.
    """

    def __init__(self, wanted: Iterable[str], words: int, punctuation: str) -> None:
        spaces = {*map(ord, punctuation), *range(0x21), 0x7F} - {ord("\n")}
        self._table = bytes(
            ord(" ") if byte in spaces else ord(chr(byte).lower()) for byte in range(128)
        ).ljust(256)
        texts = [text.split() for text in wanted if text.isascii()]
        self._whole = set(self._cleaned([" ".join(one) for one in texts]))
        long = [" ".join(one[:words]) for one in texts if len(one) >= words]
        self._rare = _rarest([b" " + start + b" " for start in self._cleaned(long)])
        self._might = np.zeros(1 << TABLE_BITS, bool)
        self._might[_slots(self._rare)] = True

    def candidates(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts that may be or contain what is wanted, in order.

        Those with characters outside of ASCII always may.
        """
        texts = iter(texts)
        while block := list(islice(texts, BLOCK)):
            plain = [row for row, text in enumerate(block) if text.isascii()]
            found = {plain[row] for row in self._found([block[row] for row in plain])}
            if len(plain) < len(block):
                found |= set(range(len(block))) - set(plain)
            yield from (block[row] for row in sorted(found))

    def _found(self, texts: Sequence[str]) -> Iterable[int]:
        """Rows of the ASCII texts that may match."""
        cleaned = self._cleaned(texts)
        found = {row for row, text in enumerate(cleaned) if text in self._whole}
        if len(self._rare):
            # No rare eight bytes hold two spaces, so none reach from one text into the next.
            ends = np.cumsum([len(text) + 2 for text in cleaned])
            joined = b" " + b"  ".join(cleaned) + b" " * 16
            starts, hits = [], []
            for shift in range(8):
                eights = np.frombuffer(joined, "<u8", (len(joined) - 8) // 8, shift)
                at = np.flatnonzero(self._might[_slots(eights)])
                starts.append(8 * at + shift)
                hits.append(eights[at])
            is_rare = np.isin(np.concatenate(hits), self._rare)
            rows = np.searchsorted(ends, np.concatenate(starts)[is_rare], side="right")
            found |= set(rows.tolist())
        return found

    def _cleaned(self, texts: Sequence[str]) -> list[bytes]:
        if not texts:
            return []
        lines = "\n".join([text.replace("\n", " ") for text in texts]).encode()
        return [b" ".join(line.split()) for line in lines.translate(self._table).split(b"\n")]


def _rarest(starts: Sequence[bytes]) -> np.ndarray:
    """Of each text eight bytes that few of the others have, as uint64 ``[m]``, ascending."""
    eights = [{text[i : i + 8] for i in range(len(text) - 7)} for text in starts]
    counts = Counter(one for some in eights for one in some)
    fours = Counter(one[i : i + 4] for one in counts for i in range(5))

    def commonness(one: bytes) -> tuple[int, int, bytes]:
        return counts[one], sum(fours[one[i : i + 4]] for i in range(5)), one

    rarest = {min(some, key=commonness) for some in eights}
    return np.unique(np.array([int.from_bytes(one, "little") for one in rarest], np.uint64))


def _slots(eights: np.ndarray) -> np.ndarray:
    """The place of each eight bytes in the table."""
    return np.right_shift(eights * MIX, np.uint64(64 - TABLE_BITS))
