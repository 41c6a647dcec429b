"""A run whose prompts have images, most of which no run would have written."""

import hashlib
import io
import os
from pathlib import Path

from made_runs import make_run
from PIL import Image as Pillow


def _png(width: int = 40, height: int = 24) -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def _claims(width: int, height: int) -> bytes:
    """A PNG whose header names another size."""
    found = _png()
    return found[:16] + width.to_bytes(4) + height.to_bytes(4) + found[24:]


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


SHOWN = {
    "good": _png(),
    "html behind it": _png() + b"<script>alert(1)</script>",
}
HOSTILE = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "gif": b"GIF89a" + bytes(40),
    "bomb": _claims(60_000, 60_000),
    "flat": _claims(0, 24),
    "large": _png() + bytes(4_000_000),
    "empty": b"",
}
"""Name → content of ``images/DIGEST.png``. Two more names are a link and a pipe."""

NAMES = ["link", "pipe", "missing", *HOSTILE]
ORDER = [*SHOWN, *NAMES]


def pictured_run(path: Path) -> Path:
    """A run with one group, whose prompt names all these images and some that are no SHA-256."""
    names = [*map(digest, ORDER), "../config", '"><img src=x onerror=alert(1)>']
    run = make_run(path, iterations=1, groups=1, samples=1, images=names)
    (run / "images").mkdir()
    for name, content in (SHOWN | HOSTILE).items():
        (run / "images" / f"{digest(name)}.png").write_bytes(content)
    (run / "images" / f"{digest('link')}.png").symlink_to(run / "config.toml")
    os.mkfifo(run / "images" / f"{digest('pipe')}.png")
    return run
