"""Stop strings: strings that end a response as soon as its text contains one of them.

A stop string is compared with text and not with token ids. It may be part of a token, several
tokens, or a character whose bytes are several tokens. The tokens up to and including the one that
completes the string stay in the response, because the policy has to learn to write them; the
response's text ends before the string (``models/codec.py``).
"""

from collections.abc import Sequence

from kimi_core.types import StopStrings

BYTES = 4
"""Most tokens that one character can take: a token for each of its bytes in UTF-8."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character."""


def tail_length(stop: StopStrings) -> int:
    """Number of last tokens of a response that can hold a stop string."""
    return BYTES * (max(map(len, stop.strings)) + 2)


def can_complete(stop: StopStrings, token: int) -> bool:
    """Whether the token's own text contains the last character of a stop string, or part of it."""
    known = stop.can_complete
    if token not in known:
        text, last = stop.text([token]), {string[-1] for string in stop.strings}
        part = BROKEN in text and not all(char.isascii() for char in last)
        known[token] = part or not last.isdisjoint(text)
    return known[token]


def is_complete(stop: StopStrings, tail: Sequence[int]) -> bool:
    """Whether a stop string is in the text of a response's last ``tail_length`` tokens, or of all.

    Ask after each token for which ``can_complete`` is true.
    """
    text = stop.text(tail)
    if _has_one(stop, text):
        return True
    # The tail may begin inside a character. Some tokenizers then write every byte up to the next
    # whole token as broken, so look from the following tokens on as well.
    return BROKEN in text and any(_has_one(stop, stop.text(tail[n:])) for n in range(1, BYTES))


def first_stop(stop: StopStrings, tokens: Sequence[int], earlier: Sequence[int]) -> int | None:
    """Index of the first of ``tokens`` that completes a stop string; None if none does.

    Args:
        tokens: new tokens of a response.
        earlier: the last ``tail_length`` tokens of the response before them, or all.
    """
    length = tail_length(stop)
    whole = [*earlier, *tokens]
    before = len(whole) - len(tokens)
    for index, token in enumerate(tokens):
        end = before + index + 1
        if can_complete(stop, token) and is_complete(stop, whole[max(0, end - length) : end]):
            return index
    return None


def cut(stop: StopStrings, text: str) -> str:
    """``text`` up to the first stop string."""
    places = [place for string in stop.strings if (place := text.find(string)) >= 0]
    return text[: min(places, default=len(text))]


def _has_one(stop: StopStrings, text: str) -> bool:
    return any(string in text for string in stop.strings)
