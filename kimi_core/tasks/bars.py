"""Charts to read: four bars, whose heights are to be added.

Widths, grey levels and noise differ from chart to chart. ``synthetic reasoning`` in the report's
words: reading alone gives no answer.
"""

import random
from collections.abc import Sequence

import numpy as np

from kimi_core.models.images import image_of_pixels
from kimi_core.tasks.rendered import noisy
from kimi_core.types import IMAGE_MARK, Image, Prompt

BARS, TALLEST = 4, 9
SIDE, UNIT = 32, 3
"""Pixels of a chart's side, and of a bar per unit of height."""


def prompts(count: int, seed: int) -> list[Prompt]:
    """``count`` charts, no two with the same heights in the same order.

    Raises:
        ValueError: there are not that many.
    """
    if count > TALLEST**BARS:
        raise ValueError(f"{count} charts: there are {TALLEST**BARS} with {BARS} bars")
    rng = random.Random(seed)
    return [prompt(place, heights, rng) for place, heights in enumerate(drawn(count, seed))]


def drawn(count: int, seed: int) -> list[list[int]]:
    """The heights of each of ``prompts``, without the charts."""
    chosen = random.Random(seed).sample(range(TALLEST**BARS), count)
    return [heights_of(code) for code in chosen]


def chart(heights: Sequence[int], rng: np.random.Generator) -> Image:
    """A chart of four bars, 32 x 32 pixels."""
    light = rng.integers(165, 256)
    levels = np.full((SIDE, SIDE), light)
    base = SIDE - 1 - rng.integers(4)
    for place, height in enumerate(heights):
        width = rng.integers(4, 8)
        left = place * SIDE // len(heights) + rng.integers(0, 9 - width)
        levels[base - UNIT * height : base, left : left + width] = rng.integers(0, 120)
    return image_of_pixels(noisy(levels, rng))


def heights_of(code: int) -> list[int]:
    """The heights of a chart by its number, from 0 to 9⁴ − 1.

    >>> heights_of(0), heights_of(6560)
    ([1, 1, 1, 1], [9, 9, 9, 9])
    """
    return [code // TALLEST**place % TALLEST + 1 for place in range(BARS)]


def problem_of(heights: Sequence[int]) -> str:
    """The tag by which a split keeps charts of the same heights together.

    >>> problem_of([3, 5, 1, 9])
    'bars 3,5,1,9'
    """
    return "bars " + ",".join(map(str, heights))


def prompt(id_: int, heights: Sequence[int], rng: random.Random) -> Prompt:
    """A chart of these heights; all else of it is drawn from ``rng``."""
    shown = ",".join(map(str, heights))
    return Prompt(
        id=id_,
        text=f"{IMAGE_MARK}total",
        answer=str(sum(heights)),
        tags={"problem": problem_of(heights), "question": f"total of {shown}", "domain": "bars"},
        images=(chart(heights, np.random.default_rng(rng.getrandbits(64))),),
    )
