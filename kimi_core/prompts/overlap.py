"""Where training data and held-out prompts overlap, so that an evaluation would measure memory."""

import unicodedata
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
    held = {normalized(prompt.text): normalized(prompt.answer) for prompt in held_out}
    trained = {normalized(prompt.text) for prompt in train}
    twice = sum(normalized(prompt.text) in trained for prompt in held_out)
    asked = answered = 0
    for prompt, response in examples:
        text = normalized(prompt if isinstance(prompt, str) else question(prompt))
        asked += text in held
        answered += bool(held.get(text)) and held[text] in normalized(response)
    found = []
    if twice:
        found.append(f"{twice} of {len(held_out)} held-out prompts are also training prompts")
    if asked:
        found.append(
            f"{asked} SFT examples have a held-out prompt, {answered} of them with its answer"
        )
    return found


def normalized(text: str) -> str:
    """``text`` without differences of case, white space and Unicode form.

    >>> normalized("What  is\\n３+4?") == normalized("what is 3+4?")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
