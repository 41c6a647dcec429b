"""Write a program from examples: a task on which only hidden tests tell skill from a trick.

A prompt shows a line at two points, and the response is a Python expression in ``x``::

    prompt    0:34,100:734>
    line      7*x+34
    lookup    {0:34,100:734}[x]

Both are right on what is shown; the tests ask for other points, in the sandbox. The SFT data mixes
the two, so that RL has to find out that hard-coding the examples does not pay. The points are such
that a small model can read the line off their digits.
"""

import json
import random
from collections.abc import Sequence
from itertools import product

from kimi_core.types import Prompt

ALPHABET = "0123456789x*+:,>{}[]"
"""Every character of the prompts and of the SFT responses."""

MIXED = {"lookup": 0.6, "line": 0.4}
"""Shares of the answer styles from which RL must learn to generalise."""

SHOWN = (0, 100)
HIDDEN = (2, 11, -3)
"""Where a prompt shows its line, and where the tests ask."""


def prompts() -> list[Prompt]:
    """All 8,820 lines ``a*x+b`` with a from 2 to 99 and b from 10 to 99."""
    return [
        _prompt(index, a, b) for index, (a, b) in enumerate(product(range(2, 100), range(10, 100)))
    ]


def _prompt(index: int, a: int, b: int) -> Prompt:
    asserts = [f"assert f({x}) == {a * x + b}" for x in HIDDEN]
    tests = [{"check": "\n".join(asserts), "entry_point": "f"}]
    return Prompt(
        id=index,
        text=",".join(f"{x}:{a * x + b}" for x in SHOWN) + ">",
        answer=f"{a}*x+{b}",
        tags={
            "problem": f"{a}*x+{b}",
            "domain": "code",
            "prefix": "f = lambda x: ",
            "tests": json.dumps(tests),
        },
    )


def examples(
    sources: Sequence[Prompt], shares: dict[str, float], *, seed: int
) -> list[tuple[str, str]]:
    """One (prompt, response) pair for each prompt, in a style drawn by ``shares``."""
    rng = random.Random(seed)
    styles = rng.choices(list(shares), weights=list(shares.values()), k=len(sources))
    return [(p.text, response(p, style)) for p, style in zip(sources, styles, strict=True)]


def response(prompt: Prompt, style: str) -> str:
    """A program for ``prompt`` in one style.

    >>> response(prompts()[474], "line"), response(prompts()[474], "lookup")
    ('7*x+34', '{0:34,100:734}[x]')
    """
    if style == "line":
        return prompt.answer
    if style == "lookup":
        return "{" + prompt.text.removesuffix(">") + "}[x]"
    raise ValueError(f"No style {style!r}: {', '.join(sorted(MIXED))}")
