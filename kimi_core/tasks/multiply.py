"""One digit times three digits: a task on which thinking pays.

A small model that blurts the product is mostly wrong, and one that works it out is mostly right.
The SFT data mixes both, so that RL has to find out *when to think* (the report's Figure 5).

    prompt    7*384=
    terse     #2688
    worked    7*4=28>8,2;7*8=56+2=58>8,5;7*3=21+5=26>26#2688
    checked   7*4=28>8,2; ... 26>26?7*4=28>8,2; ... 26>26#2688

A worked answer goes digit by digit from the right, as at school: product, carry added, the digit
to write down and the carry to take along.
"""

import random
from collections.abc import Sequence

from kimi_core.types import Prompt

ALPHABET = "0123456789*+=>,;?#"
"""Every character of the prompts and of the SFT responses."""

MIXED = {"terse": 0.60, "worked": 0.24, "checked": 0.16}
"""Shares of the answer styles from which RL must learn to think."""

LENGTHS = {"worked": 0.25, "checked": 0.25, "checked twice": 0.25, "restated": 0.25}
"""Shares of four right ways to answer that differ in length, for the length reward to choose."""


def prompts() -> list[Prompt]:
    """All 7,200 products of one digit (2 to 9) and three digits (100 to 999)."""
    return [
        Prompt(
            id=index,
            text=f"{a}*{b}=",
            answer=str(a * b),
            tags={"problem": f"{a}*{b}", "domain": "arithmetic"},
        )
        for index, (a, b) in enumerate((a, b) for a in range(2, 10) for b in range(100, 1000))
    ]


def examples(
    sources: Sequence[Prompt], shares: dict[str, float], *, seed: int
) -> list[tuple[str, str]]:
    """One (prompt, response) pair for each prompt, in a style drawn by ``shares``."""
    rng = random.Random(seed)
    styles = rng.choices(list(shares), weights=list(shares.values()), k=len(sources))
    return [(p.text, response(p.text, style)) for p, style in zip(sources, styles, strict=True)]


def response(prompt: str, style: str) -> str:
    """The answer to ``prompt`` in one style.

    >>> response("7*384=", "terse")
    '#2688'
    >>> response("7*384=", "worked")
    '7*4=28>8,2;7*8=56+2=58>8,5;7*3=21+5=26>26#2688'
    """
    a, b = (int(number) for number in prompt.rstrip("=").split("*"))
    answer = f"#{a * b}"
    worked = _school_method(a, b)
    if style == "terse":
        return answer
    if style == "worked":
        return worked + answer
    if style == "restated":
        return f"{a}*{b};{worked};{a * b}{answer}"
    if style == "checked":
        return f"{worked}?{worked}{answer}"
    if style == "checked twice":
        return f"{worked}?{worked}?{worked}{answer}"
    raise ValueError(f"No style {style!r}: {', '.join(sorted({*MIXED, *LENGTHS}))}")


def _school_method(a: int, b: int) -> str:
    steps, carry = [], 0
    digits = [int(digit) for digit in reversed(str(b))]
    for position, digit in enumerate(digits):
        product = a * digit
        total = product + carry
        shown = f"{a}*{digit}={product}" + (f"+{carry}={total}" if position else "")
        last = position == len(digits) - 1
        steps.append(f"{shown}>{total}" if last else f"{shown}>{total % 10},{total // 10}")
        carry = total // 10
    return ";".join(steps)
