"""Add numbers that lie spread over a long text: a task that needs all of its context.

The text holds records among filler: a name of one character and a digit from 0 to 3. Records lie in
random order, and the text ends with the name of the last one. The answer is the sum of all digits::

    prompt    .,b1..,.a3,....,,.c2..c=
    terse     #6
    worked    a3>3;b1>4;c2>6;#6

A worked answer finds one record after the other and writes the sum so far. A terse answer is a
guess, because a small model cannot add what it has not found. The SFT data mixes both, so RL has to
find out that working pays, as in ``multiply``, but with thousands of tokens to look through.

SFT teaches short texts first of all: with them a small model learns to find a record, and a few
long ones carry this over to the whole length.
"""

import random
from collections.abc import Iterator
from itertools import pairwise

from kimi_core.types import Prompt

FILLER = ".,"
LARGEST = 3
"""Largest digit. With all ten digits, the last digit of a sum tells nothing about the next one, and
a small model needs far longer to learn it."""

MIXED = {"terse": 0.5, "worked": 0.5}
"""Shares of the answer styles from which RL must learn to work."""


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
        text, answer = _text(numbers, length, pool, rng)
        made.append(Prompt(index, text, answer, tags={"domain": "retrieval"}))
    return made


def _names_in(numbers: int, length: int) -> str:
    """The names of a text's records, which must fit into it."""
    needed = 2 * numbers + 2
    if length < needed:
        raise ValueError(
            f"prompts.task.length = {length}; {numbers} records of two characters and the question "
            f"need {needed}: raise it or lower prompts.task.numbers"
        )
    return names(numbers)


def _text(numbers: int, length: int, pool: str, rng: random.Random) -> tuple[str, str]:
    """A text with the records of the first ``numbers`` names, and its answer."""
    digits = rng.choices(range(LARGEST + 1), k=numbers)
    records = [f"{name}{digit}" for name, digit in zip(pool, digits, strict=False)]
    rng.shuffle(records)
    free = length - 2 * numbers - 2
    cuts = [0, *sorted(rng.choices(range(free + 1), k=numbers)), free]
    filler = "".join(rng.choices(FILLER, k=free))
    parts = [filler[start:end] for start, end in pairwise(cuts)]
    text = "".join(part + record for part, record in zip(parts, [*records, ""], strict=True))
    return f"{text}{pool[numbers - 1]}=", str(sum(digits))


def examples(
    count: int, numbers: int, length: int, shares: dict[str, float], *, seed: int
) -> list[tuple[str, str]]:
    """``count`` (prompt, response) pairs, in styles drawn by ``shares``.

    Most have few records and little filler, and some are as long as the prompts. They are drawn
    apart from the prompts.

    Raises: ValueError as ``prompts``.
    """
    pool = _names_in(numbers, length)
    rng = random.Random(f"examples {seed}")
    styles = rng.choices(list(shares), weights=list(shares.values()), k=count)
    pairs = []
    for style in styles:
        few = 1 + int(numbers * rng.random() ** 2)
        filler = int((length - 2 * numbers - 1) ** (rng.random() ** 2))
        text, _ = _text(few, 2 * few + 2 + filler, pool, rng)
        pairs.append((text, response(text, style)))
    return pairs


def response(prompt: str, style: str) -> str:
    """The answer to ``prompt`` in one style.

    >>> response(".,b1..,.a3,....,,.c2..c=", "worked")
    'a3>3;b1>4;c2>6;#6'
    >>> response(".,b1..,.a3,....,,.c2..c=", "terse")
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
    """The records of a text, in the order of their names."""
    text = prompt[:-2]
    found = {text[i - 1]: int(text[i]) for i in range(1, len(text)) if text[i].isdecimal()}
    for name in names(len(found)):
        yield name, found[name]
