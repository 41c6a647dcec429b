"""Near-duplicates among texts, and evaluation prompts that leaked into others.

Two texts are near-duplicates if they hold the same numbers in the same order and the Jaccard
similarity of their sets of character 5-grams is at least a threshold. The search is exact: no
hashing can miss a pair. It compares only texts that share one of their rarest grams (prefix
filtering: Chaudhuri, Ganti and Kaushik 2006). If two sets are that similar, the first
|s| − ⌈t·|s|⌉ + 1 grams of each, in one fixed order, have one in common.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from kimi_core.prompts.overlap import normalized

GRAM = 5
"""Characters of a gram."""

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For each text the first earlier one that it nearly is; None if there is none.

    Texts that differ in a number are different problems, however alike they are.

    Args:
        threshold: least Jaccard similarity, above 0 and at most 1.
    """
    plain = [normalized(text) for text in texts]
    counts = Counter(gram for text in plain for gram in _grams(text))
    # Ties in one fixed order, so that the prefixes of two texts are comparable.
    order = {gram: n for n, (gram, _) in enumerate(sorted(counts.items(), key=_rarest_first))}
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    kept: list[set[int]] = []
    found: list[int | None] = []
    for row, text in enumerate(plain):
        grams = sorted(order[gram] for gram in _grams(text))
        mine, numbers = set(grams), " ".join(NUMBER.findall(text))
        prefix = grams[: len(grams) - math.ceil(threshold * len(grams)) + 1]
        candidates = {other for gram in prefix for other in holders[numbers, gram]}
        alike = (other for other in candidates if _jaccard(mine, kept[other]) >= threshold)
        found.append(min(alike, default=None))
        kept.append(mine)
        for gram in prefix:
            holders[numbers, gram].append(row)
    return found


def _grams(text: str) -> set[str]:
    """The character 5-grams of a text; of a shorter one, the text."""
    return {text[at : at + GRAM] for at in range(max(len(text) - GRAM, 0) + 1)}


def _rarest_first(item: tuple[str, int]) -> tuple[int, str]:
    gram, count = item
    return count, gram


def _jaccard(one: set[int], other: set[int]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


class Leaks:
    """Finds texts of a set inside others, also if a few words were changed.

    A text is inside another one if that holds all of its numbers and at least half of its word
    n-grams. Common phrases and questions of one kind with other numbers are not enough for that. A
    text of fewer words than ``n`` is a gram itself, and is found only where it is the whole text.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._n = n
        plain = [normalized(text) for text in texts]
        grams = [self._grams(text) for text in plain]
        self._sizes = [*map(len, grams)]
        self._numbers = [Counter(NUMBER.findall(text)) for text in plain]
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for row, some in enumerate(grams):
            for gram in some:
                self._holders[gram].append(row)

    def inside(self, text: str) -> int | None:
        """The first of the texts that is inside ``text``; None if none is."""
        text = normalized(text)
        numbers = Counter(NUMBER.findall(text))
        shared = Counter(row for gram in self._grams(text) for row in self._holders.get(gram, ()))
        found = (
            row
            for row, count in shared.items()
            if 2 * count >= self._sizes[row] and self._numbers[row] <= numbers
        )
        return min(found, default=None)

    def _grams(self, text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + self._n]) for at in range(max(len(words) - self._n, 0) + 1)}
