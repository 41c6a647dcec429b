"""Add numbers that lie spread over a long text: a task that needs all of its context.

The text holds records among filler: a name of one character and a digit from 0 to 3. Records lie in
random order, and the text ends with the names of the first and the last one. The answer is the sum
of all digits::

    prompt    .,b1..,.a3,....,,.c2..ac=
    terse     #6
    worked    a3>3;b1>4;c2>6;#6

A worked answer finds one record after the other and writes the sum so far. A terse answer is a
guess, because a small model cannot add what it has not found. The last SFT examples mix both, so RL
has to find out that working pays, as in ``multiply``, but with thousands of tokens to look through.
"""

import random
from collections.abc import Iterator
from itertools import pairwise

from kimi_core.types import Prompt

FILLER = ".,"
QUESTION = 3
"""Characters of the question: the first name, the last name and an equals sign."""
LARGEST = 3
"""Largest digit. With all ten digits, the last digit of a sum tells nothing about the next one, and
a small model needs far longer to learn it."""

MIXED = {"terse": 0.5, "worked": 0.5}
"""Shares of the answer styles from which RL must learn to work."""


FEW = 4
"""The most records in the first SFT examples. A small model learns in minutes to find one of a few
records in a short text. Long texts then need few examples; from the start they teach nothing
(``docs/log.md``)."""


def names(count: int) -> str:
    """``count`` names: the Latin letters, then Chinese characters, of which there are 20,000.

    >>> names(3), names(54)[-2:]
    ('abc', '一丁')

    Raises:
        ValueError: there are fewer.
    """
    latin = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if not 1 <= count <= 20_000:
        raise ValueError(f"prompts.task.numbers = {count}; allowed are 1 to 20000")
    return (latin + "".join(map(chr, range(0x4E00, 0x4E00 + count))))[:count]


def alphabet(numbers: int) -> str:
    """Every character of prompts and responses with at most ``numbers`` records."""
    return "0123456789>;#=" + FILLER + names(numbers)


def prompts(count: int, numbers: int, length: int, seed: int) -> list[Prompt]:
    """``count`` prompts of ``length`` characters, with ``numbers`` records each.

    Raises:
        ValueError: a record has no name, or the records do not fit into the text.
    """
    pool = _names_in(numbers, length)
    rng = random.Random(seed)
    made = []
    for index in range(count):
        text, answer = _text(length, pool, rng)
        made.append(Prompt(index, text, answer, tags={"domain": "retrieval"}))
    return made


def _names_in(numbers: int, length: int) -> str:
    """The names of a text's records, which must fit into it."""
    needed = 2 * numbers + QUESTION
    if length < needed:
        raise ValueError(
            f"prompts.task.length = {length}; {numbers} records of two characters and the question "
            f"need {needed}: raise it or lower prompts.task.numbers"
        )
    return names(numbers)


def _text(length: int, named: str, rng: random.Random) -> tuple[str, str]:
    """A text of ``length`` characters with a record for each name, and its answer."""
    digits = rng.choices(range(LARGEST + 1), k=len(named))
    records = [f"{name}{digit}" for name, digit in zip(named, digits, strict=True)]
    rng.shuffle(records)
    free = length - 2 * len(named) - QUESTION
    cuts = [0, *sorted(rng.choices(range(free + 1), k=len(named))), free]
    filler = "".join(rng.choices(FILLER, k=free))
    parts = [filler[start:end] for start, end in pairwise(cuts)]
    text = "".join(part + record for part, record in zip(parts, [*records, ""], strict=True))
    return f"{text}{named[0]}{named[-1]}=", str(sum(digits))


def examples(
    count: int, numbers: int, length: int, shares: dict[str, float], *, seed: int
) -> list[tuple[str, str]]:
    """``count`` (prompt, response) pairs, from short texts to long ones.

    Records grow up to ``numbers`` in the first 20 %. From 65 % to 90 % filler grows up to the
    length of the prompts. The last 10 % draw their styles by ``shares``; the
    others are worked answers. A text has the records of names that follow one another, with the
    first name drawn at random. The pairs are drawn apart from the prompts.

    Raises: ValueError as ``prompts``.
    """
    pool = _names_in(numbers, length)
    rng = random.Random(f"examples {seed}")
    room = length - 2 * numbers - QUESTION
    pairs = []
    for progress in (index / count for index in range(count)):
        most = FEW + (numbers - FEW) * min(1, progress / 0.2) if numbers > FEW else numbers
        power = 0.3 + 0.7 * min(1, max(0, (progress - 0.65) / 0.25))
        named = 1 + int(most * rng.random())
        first = rng.randrange(numbers - named + 1)
        size = 2 * named + QUESTION + int(room ** (power * rng.random()))
        text, _ = _text(size, pool[first : first + named], rng)
        style = "worked"
        if progress >= 0.9:
            (style,) = rng.choices(list(shares), weights=list(shares.values()))
        pairs.append((text, response(text, style)))
    return pairs


def response(prompt: str, style: str) -> str:
    """The answer to ``prompt`` in one style.

    >>> response(".,b1..,.a3,....,,.c2..ac=", "worked")
    'a3>3;b1>4;c2>6;#6'
    >>> response(".,b1..,.a3,....,,.c2..ac=", "terse")
    '#6'
    """
    steps, total = [], 0
    for name, digit in _records(prompt):
        total += digit
        steps.append(f"{name}{digit}>{total};")
    if style == "terse":
        return f"#{total}"
    if style == "worked":
        return f"{''.join(steps)}#{total}"
    raise ValueError(f"No style {style!r}: {', '.join(sorted(MIXED))}")


def _records(prompt: str) -> Iterator[tuple[str, int]]:
    """The records of a text, in the order of ``names``."""
    text = prompt[:-QUESTION]
    found = {text[i - 1]: int(text[i]) for i in range(1, len(text)) if text[i].isdecimal()}
    for name in sorted(found, key=str.swapcase):  # Small letters come before capital ones.
        yield name, found[name]
