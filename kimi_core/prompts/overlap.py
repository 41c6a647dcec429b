"""Where training data and held-out prompts overlap, so that an evaluation would measure memory."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kimi_core.prompts.candidates import Filter
from kimi_core.prompts.jsonl import TextExample
from kimi_core.prompts.many import texts_of
from kimi_core.prompts.messages import question
from kimi_core.prompts.telling import COMMON, COMMON_SHARE, TellingAnswers
from kimi_core.types import Prompt

QUOTED_WORDS = 8
"""A held-out prompt of at least so many words is looked for inside longer texts, too. A shorter one
stands in other texts by chance."""


def overlaps(
    train: Sequence[Prompt], held_out: Sequence[Prompt], examples: Iterable[TextExample]
) -> list[str]:
    """A sentence for each kind of overlap, with its count; empty if there is none.

    Prompts with images are left out: a task has to see to them (``tasks/vision.py`` does). Texts
    are compared in any case, with any white space, and without punctuation at the ends of
    words (see ``normalized``). Under other prompts only telling answers are looked for (see
    ``telling``).

    Args:
        train: the prompts that RL trains on.
        held_out: the prompts of the evaluation.
        examples: the (prompt, response) pairs of SFT.
    """
    held: dict[str, set[str]] = defaultdict(set)
    answers: dict[str, set[str]] = defaultdict(set)
    for one in held_out:
        if one.images:
            continue
        held[normalized(one.text)].add(normalized(one.answer))
        answers[normalized(one.text)].add(one.answer)
    telling = TellingAnswers(answers)
    quotes = Quotes(held)
    trained: set[str] = set()
    quoting: set[str] = set()
    for raw in Filter(held, QUOTED_WORDS, PUNCTUATION).candidates(texts_of(train)):
        text = normalized(raw)
        if text in held:
            trained.add(text)
        elif quotes.inside(text):
            quoting.add(text)
    twice = sum(normalized(one.text) in trained for one in held_out if not one.images)
    asked = answered = 0
    for prompt_text, response in examples:
        if isinstance(prompt_text, Prompt):
            if prompt_text.images:
                continue
            prompt_text = prompt_text.messages or prompt_text.text
        given = prompt_text if isinstance(prompt_text, str) else question(prompt_text)
        text, raw = normalized(given), response
        response = normalized(raw)
        found = {text} & held.keys() | quotes.inside(text) | quotes.inside(response)
        telling.look(f"{given} / {raw}", found)
        asked += bool(found)
        answered += any(_has(response, answer) for one in found for answer in held[one])
    said = []
    if twice:
        said.append(f"{twice} of {len(held_out)} held-out prompts are also training prompts")
    if quoting:
        said.append(f"{len(quoting)} training prompts contain a held-out prompt")
    if asked:
        said.append(
            f"{asked} SFT examples have a held-out prompt, {answered} of them with its answer"
        )
    return said + _elsewhere(telling)


def _elsewhere(telling: TellingAnswers) -> list[str]:
    """Sentences on held-out answers in SFT examples of other prompts."""
    examples, prompts, common = telling.found()
    said = []
    if examples:
        said.append(
            f"{len(examples)} SFT examples have the answer to a held-out prompt under another "
            f"prompt, to {len(prompts)} held-out prompts"
        )
    if common:
        said.append(
            f"{common} held-out answers stand in more than {COMMON} SFT examples of other prompts, "
            f"and in more than {COMMON_SHARE:.0%} of them; they are too common to be counted"
        )
    return said


class Quotes:
    """Finds texts inside longer ones, in time that grows with the longer ones alone."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._by_start: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for text in texts:
            words = text.split()
            if len(words) >= QUOTED_WORDS:
                self._by_start[tuple(words[:QUOTED_WORDS])].append(text)

    def inside(self, text: str) -> set[str]:
        """Those of the texts that stand in a longer one. All are ``normalized``."""
        if not self._by_start:
            return set()
        words = text.split()
        starts = range(len(words) - QUOTED_WORDS + 1)
        candidates = (self._by_start.get(tuple(words[i : i + QUOTED_WORDS]), ()) for i in starts)
        return {one for some in candidates for one in some if one in text}


def _has(text: str, answer: str) -> bool:
    """Whether the answer stands in the text, and not as a part of a longer word or number."""
    return bool(answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


def normalized(text: str) -> str:
    """``text`` without differences of case, white space, Unicode form and punctuation around words.

    >>> normalized("What  is\\n３+4 ?") == normalized("“What is 3+4.”")
    True
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, (word.strip(PUNCTUATION) for word in words)))


PUNCTUATION = ".,;:!?\"'`“”‘’«»()[]{}*_"
