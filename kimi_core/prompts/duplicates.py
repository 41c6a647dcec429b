"""Near-duplicates among texts, and n-grams that training prompts share with evaluation sets.

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


class WordGrams:
    """The word n-grams of a set of texts.

    A text of fewer words than ``n`` is a gram itself, and is found only where it is the whole text.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._n = n
        self._known = {gram for text in texts for gram in self._of(text)}

    def shared(self, text: str) -> bool:
        """Whether ``text`` has an n-gram of the set."""
        return not self._known.isdisjoint(self._of(text))

    def _of(self, text: str) -> set[tuple[str, ...]]:
        words = normalized(text).split()
        return {tuple(words[at : at + self._n]) for at in range(max(len(words) - self._n, 0) + 1)}
