"""Checksums of files, so that damage on the disk is found and not trained on."""

import json
from pathlib import Path

from kimi_core import _C

NAME = "checksums.json"
BLOCK = 1 << 24


def write_checksums(folder: Path) -> None:
    """Write the CRC-32C and the size of every other file in ``folder`` to ``checksums.json``."""
    found = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    (folder / NAME).write_text(json.dumps(found, separators=(",", ":")))


def damage_in(folder: Path, only: str | None = None) -> str:
    """The first file that is not as it was written, in words; empty: all are.

    ``only`` names the one file to look at.
    """
    try:
        expected = json.loads((folder / NAME).read_text())
        for name in expected if only is None else [only]:
            path, wanted = folder / name, expected[name]
            if not path.is_file():
                return f"{path} is missing"
            found = checksum(path)
            if found != wanted:
                sizes = f"{wanted[1]} bytes were written, {found[1]} are there"
                return f"{path} is damaged ({sizes}; the checksum differs)"
        if unlisted := {path.name for path in folder.iterdir()} - expected.keys() - {NAME}:
            return f"{folder / NAME} does not list {min(unlisted)}"
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        return f"{folder / NAME} cannot be read ({type(error).__name__}: {error})"
    return ""


def checksum(path: Path, size: int | None = None) -> list[int]:
    """CRC-32C and number of bytes of a file, or of its first ``size`` bytes."""
    crc = count = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK if size is None else min(BLOCK, size - count)):
            crc, count = _C.crc32c(block, crc), count + len(block)
    return [crc, count]
