"""Text and three kinds of images in equal parts: does a model reason about what it sees?

    text        7*38=                  as in ``multiply``, with two digits
    rendered    [image of 7*38=]       the same questions as pictures
    photos      [image of 3 digits]add
    bars        [image of 4 bars]total

The SFT data begins with reading, [image]read, because a tower with random weights learns nothing
from answers alone. Answers come in gradually, half of them terse and half worked. RL has to find
out that reading and working pay, in text and in images alike.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, product

import numpy as np

from kimi_core.tasks import bars, multiply, photos
from kimi_core.tasks.rendered import rendered
from kimi_core.types import IMAGE_MARK, Prompt

ALPHABET = "".join(sorted({*multiply.ALPHABET, *"add", *"total", *"read"}))
"""Every character of the prompts and of the SFT responses."""

STYLES = {"terse": 0.5, "worked": 0.3, "checked": 0.2}
"""Shares of the answer styles of text and rendered text; images have no checked answers."""

KINDS = {"text": 0.40, "rendered": 0.29, "photos": 0.16, "bars": 0.15}
"""Shares of the SFT examples that ask for answers."""

READING = (0.2, 0.5, 0.25)
"""Reading is all of SFT up to the first of these shares of it; from the second on, its share is the
third; in between it falls linearly."""

TIMES = 2
"""How often each product is asked, as text and as a picture."""

COUNT = 720 * TIMES
"""Prompts of each kind."""

POOL = 4000
"""Images of each kind that SFT draws from."""

Example = tuple[Prompt, str]


def prompts(seed: int) -> list[Prompt]:
    """1,440 prompts of each kind: products of 2 to 9 and 10 to 99 as text and as pictures, photos,
    and bars. Each product is there twice, and no picture is like another.

    Raises:
        ValueError: Pillow or the photographs cannot be had.
    """
    texts = [
        Prompt(0, f"{a}*{b}=", str(a * b), tags={"problem": f"{a}*{b}", "domain": "text"})
        for a, b in list(product(range(2, 10), range(10, 100))) * TIMES
    ]
    pictures = [rendered(one, seed=seed + place) for place, one in enumerate(texts)]
    made = [*texts, *pictures, *photos.prompts(COUNT, seed), *bars.prompts(COUNT, seed)]
    return [replace(prompt, id=place) for place, prompt in enumerate(made)]


def examples(train: Sequence[Prompt], count: int, *, split_seed: int, seed: int) -> list[Example]:
    """``count`` (prompt, response) pairs in the order in which they are to be learned.

    Nothing of a held-out prompt is in them: no product, no photograph and no four heights.

    Args:
        train: the training prompts of ``prompts(split_seed)``.
    """
    rng = random.Random(seed)
    pools = _pools(train, split_seed, rng)
    made = []
    for place in range(count):
        if rng.random() < _reading_share(place / count):
            made.append(_reading(rng.choice(pools[rng.choice(("rendered", "photos", "bars"))])))
        else:
            (kind,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
            made.append(_answered(rng.choice(pools[kind]), rng))
    return made


def _reading_share(progress: float) -> float:
    start, end, last = READING
    return float(np.interp(progress, [start, end], [1.0, last]))


def _pools(train: Sequence[Prompt], split_seed: int, rng: random.Random) -> dict[str, list[Prompt]]:
    """Kind → prompts to make examples of."""
    texts = [one for one in train if one.tags["domain"] == "text"]
    trained = {one.tags["problem"] for one in train}
    shown = photos.drawn(COUNT, split_seed)
    held_photos = {row for rows in shown if photos.problem_of(rows) not in trained for row in rows}
    free = [row for row in range(len(photos.digits()[1])) if row not in held_photos]
    drawn = {bars.problem_of(one) for one in bars.drawn(COUNT, split_seed)}
    every = map(bars.heights_of, range(bars.TALLEST**bars.BARS))
    charts = [one for one in every if bars.problem_of(one) not in drawn - trained]
    return {
        "text": texts,
        "rendered": [rendered(rng.choice(texts), seed=rng.getrandbits(63)) for _ in range(POOL)],
        "photos": [photos.prompt(0, rng.sample(free, photos.ADDENDS)) for _ in range(POOL)],
        "bars": [bars.prompt(0, rng.choice(charts), rng) for _ in range(POOL)],
    }


def _reading(prompt: Prompt) -> Example:
    """What an image shows, character by character: ``7*38=``, ``567`` or ``3519``."""
    shown = prompt.tags["question"]
    if prompt.tags["domain"] != "rendered":
        shown = "".join(_listed(shown))
    return replace(prompt, text=f"{IMAGE_MARK}read"), shown


def _answered(prompt: Prompt, rng: random.Random) -> Example:
    (style,) = rng.choices(list(STYLES), weights=list(STYLES.values()))
    return prompt, response(prompt, style)


def response(prompt: Prompt, style: str) -> str:
    """The answer to a prompt in one style.

    >>> shown = Prompt(0, "", "18", tags={"question": "add 5,6,7", "domain": "photos"})
    >>> response(shown, "terse"), response(shown, "worked")
    ('#18', '567;5+6=11;11+7=18#18')
    """
    if prompt.tags["domain"] in ("text", "rendered"):
        return multiply.response(prompt.tags.get("question", prompt.text), style)
    if style == "terse":
        return f"#{prompt.answer}"
    addends = [int(one) for one in _listed(prompt.tags["question"])]
    sums = list(accumulate(addends))
    steps = [f"{a}+{b}={c}" for a, b, c in zip(sums, addends[1:], sums[1:], strict=False)]
    read = _reading(prompt)[1]  # What the reading task asks for comes first.
    return ";".join([read, *steps]) + f"#{prompt.answer}"


def _listed(text: str) -> list[str]:
    """The numbers in ``add 5,6,7`` and the like."""
    return text.rpartition(" ")[2].split(",")
