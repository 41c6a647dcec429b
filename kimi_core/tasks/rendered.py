"""Questions as pictures of their text: the same problem for eyes.

Pillow's built-in font is a bitmap, so no font file is needed. Contrast, place and noise differ from
picture to picture, so that a model has to read and cannot compare pixels.
"""

from dataclasses import replace
from functools import lru_cache
from math import ceil, sqrt

import numpy as np

from kimi_core.models.images import image_of_pixels
from kimi_core.types import IMAGE_MARK, Prompt

CELL_WIDTH, CELL_HEIGHT = 8, 16
"""Pixels of a character's cell; the font's characters have 6 x 11."""
COLUMNS = 4
"""Least number of characters in a line. A picture has at least two lines."""


def rendered(prompt: Prompt, *, seed: int) -> Prompt:
    """The prompt with its text as an image, and no text besides.

    Up to eight characters make a picture of 32 x 32 pixels; longer texts one that is about square.
    The answer stays, and so does the ``problem`` tag, so both forms fall on one side of a split.
    The tag ``question`` holds the text.

    Args:
        seed: decides contrast, place and noise.

    Raises:
        ValueError: Pillow is not installed.
    """
    tags = {"problem": prompt.text} | prompt.tags
    return replace(
        prompt,
        text=IMAGE_MARK,
        tags=tags | {"question": prompt.text, "domain": "rendered"},
        images=(image_of_pixels(pixels_of(prompt.text, np.random.default_rng(seed))),),
    )


def pixels_of(text: str, rng: np.random.Generator) -> np.ndarray:
    """The text in dark on light, grey levels uint8 ``[h, w]``."""
    columns = max(COLUMNS, ceil(sqrt(2 * len(text))))
    lines = max(2, ceil(len(text) / columns))
    ink = np.zeros((lines * CELL_HEIGHT, columns * CELL_WIDTH), bool)
    down, right = rng.integers(3, size=2)
    for place, char in enumerate(text):
        top, left = place // columns * CELL_HEIGHT + down, place % columns * CELL_WIDTH + right
        glyph = _glyph(char)
        ink[top + 1 : top + 1 + len(glyph), left : left + glyph.shape[1]] |= glyph
    dark, light = rng.integers(0, 90), rng.integers(165, 256)
    return noisy(np.where(ink, dark, light), rng)


def noisy(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey levels with noise of standard deviation 8, uint8."""
    return np.clip(levels + rng.normal(0, 8, levels.shape), 0, 255).astype(np.uint8)


@lru_cache(maxsize=1024)
def _glyph(char: str) -> np.ndarray:
    """A character of the font, bool ``[h, w]``."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("1", (CELL_WIDTH - 2, CELL_HEIGHT - 3))
    ImageDraw.Draw(canvas).text((0, 0), char, fill=1, font=ImageFont.load_default_imagefont())
    return np.array(canvas)
