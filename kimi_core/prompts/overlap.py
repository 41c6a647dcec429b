"""Where training data and held-out prompts overlap, so that an evaluation would measure memory."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kimi_core.prompts.load import TextExample
from kimi_core.prompts.messages import question
from kimi_core.types import Prompt


def overlaps(
    train: Sequence[Prompt], held_out: Sequence[Prompt], examples: Iterable[TextExample]
) -> list[str]:
    """A sentence for each kind of overlap, with its count; empty if there is none.

    Texts are compared in any case and with any white space (see ``normalized``).

    Args:
        train: the prompts that RL trains on.
        held_out: the prompts of the evaluation.
        examples: the (prompt, response) pairs of SFT.
    """
    held: dict[str, set[str]] = defaultdict(set)
    for one in held_out:
        held[normalized(one.text)].add(normalized(one.answer))
    trained = {normalized(prompt.text) for prompt in train}
    twice = sum(normalized(prompt.text) in trained for prompt in held_out)
    asked = answered = 0
    for prompt, response in examples:
        text = normalized(prompt if isinstance(prompt, str) else question(prompt))
        asked += text in held
        answered += any(_has(normalized(response), answer) for answer in held.get(text, ()))
    found = []
    if twice:
        found.append(f"{twice} of {len(held_out)} held-out prompts are also training prompts")
    if asked:
        found.append(
            f"{asked} SFT examples have a held-out prompt, {answered} of them with its answer"
        )
    return found


def _has(text: str, answer: str) -> bool:
    """Whether the answer stands in the text, and not as a part of a longer word or number."""
    return bool(answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


def normalized(text: str) -> str:
    """``text`` without differences of case, white space and Unicode form.

    >>> normalized("What  is\\n３+4?") == normalized("what is 3+4?")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
