"""Reads ``images/DIGEST.png`` of a run folder, which may come from anybody.

Only what a run would have written is given out: a regular file that begins as a small PNG does.
"""

import os
import re
import stat
from pathlib import Path

from kimi_core.dashboard.missing import Missing

DIGEST = re.compile(r"[0-9a-f]{64}")

MOST_BYTES = 4_000_000
MOST_SIDE = 512
"""Limits of a file and of an image in it. A larger one could fill the memory of a browser."""

BEGINS = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def is_digest(name: object) -> bool:
    """Whether this is a SHA-256 as a run writes it; nothing else can become part of a path."""
    return isinstance(name, str) and DIGEST.fullmatch(name) is not None


def picture(run: Path, digest: str) -> bytes:
    """The PNG of the image with this SHA-256.

    Raises:
        Missing: the run has none.
        ValueError: the file is not one that a run writes.
    """
    folder = run / "images"
    if not is_digest(digest) or folder.is_symlink():
        raise Missing(f"{run.name} has no such image")
    path = folder / f"{digest}.png"
    try:
        # A pipe would block, and a link may lead anywhere.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Missing(f"{run.name} has no image {digest[:16]}: {error.strerror}") from None
    with open(handle, "rb") as file:
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        content = file.read(MOST_BYTES + 1) if is_file else b""
    if not _is_small_png(content):
        raise ValueError(f"{path.name} is not a PNG that a run writes")
    return content


def _is_small_png(content: bytes) -> bool:
    begins = len(BEGINS)
    width, height = (int.from_bytes(content[at : at + 4]) for at in (begins, begins + 4))
    is_small = 0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE and len(content) <= MOST_BYTES
    return content.startswith(BEGINS) and is_small
