"""Held-out answers in examples of other prompts.

A short answer stands everywhere by chance, so only a telling one is looked for. Of an answer, each
letter counts 1, each digit 2 and each character of a script without letters (such as Chinese) 4; a
character that repeats the one before it, a sign and a LaTeX command count 0. A letter of English
text carries about 1.5 bits, a digit 3.3: ``TELLING`` is about 30 bits, one chance in 10⁹ for each
place where the answer could stand. A phrase can still be common, so an answer that stands in more
than ``COMMON`` examples, and in more than ``COMMON_SHARE`` of them, is not counted either.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

TELLING = 20
"""Least weight of an answer that is looked for: 20 letters, or 10 digits."""

COMMON = 10
COMMON_SHARE = 0.01

_WORD = re.compile(r"\\[a-z]+|(\d+(?:,\d{3})+|[^\W_]+)")


class TellingAnswers:
    """Looks for answers in texts, in time that grows with the texts alone.

    Args:
        answers: the held-out answers, by prompt; a prompt may have several.
    """

    def __init__(self, answers: Mapping[str, Iterable[str]]) -> None:
        self._by_rarest: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._examples: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self.prompts: dict[tuple[str, ...], set[str]] = defaultdict(set)
        """The held-out prompts of each answer that is looked for."""
        for prompt, some in answers.items():
            for answer in some:
                words = words_of(answer)
                if sum(map(_weight, words)) >= TELLING:
                    self.prompts[words].add(prompt)
                    self._by_rarest[max(words, key=_weight)].add(words)
        self._examples_seen = 0

    def look(self, text: str, own: Iterable[str]) -> None:
        """Note the answers in an example, except those to its ``own`` held-out prompts."""
        example, own = self._examples_seen, set(own)
        self._examples_seen += 1
        if not self._by_rarest:
            return
        words = words_of(text)
        places: dict[str, list[int]] = defaultdict(list)
        for at, word in enumerate(words):
            if word in self._by_rarest:
                places[word].append(at)
        for word, starts in places.items():
            for answer in self._by_rarest[word]:
                first = answer.index(word)
                if not self.prompts[answer] <= own and any(
                    words[max(at - first, 0) : at - first + len(answer)] == answer for at in starts
                ):
                    self._examples[answer].add(example)

    def found(self) -> tuple[set[int], set[str], int]:
        """Numbers of the examples with a held-out answer, the prompts that have these answers, and
        the number of answers that are too common to count."""
        limit = max(COMMON, COMMON_SHARE * self._examples_seen)
        rare = {answer: some for answer, some in self._examples.items() if len(some) <= limit}
        examples = {number for some in rare.values() for number in some}
        prompts = {prompt for answer in rare for prompt in self.prompts[answer]}
        return examples, prompts, len(self._examples) - len(rare)


def words_of(text: str) -> tuple[str, ...]:
    r"""Words and numbers, in lower case; no signs and LaTeX commands.

    >>> words_of(r"So, $\frac{12,345}{x_1}$!")
    ('so', '12345', 'x', '1')
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return tuple(one[1].replace(",", "") for one in _WORD.finditer(text) if one[1])


def _weight(word: str) -> int:
    """What a word tells, as this module's docstring says."""
    weight = 0
    for before, one in zip(" " + word, word, strict=False):
        if one != before:
            weight += 2 if one.isdigit() else 4 if unicodedata.category(one) == "Lo" else 1
    return weight
