"""Checksums of the files of a folder, so that damage on the disk is found and not trained on."""

import json
from pathlib import Path

from kimi_core import _C

NAME = "checksums.json"
BLOCK = 1 << 24


def write_checksums(folder: Path) -> None:
    """Write the CRC-32C and the size of every other file in ``folder`` to ``checksums.json``."""
    found = {path.name: _sum(path) for path in sorted(folder.iterdir())}
    (folder / NAME).write_text(json.dumps(found, separators=(",", ":")))


def damage_in(folder: Path) -> str:
    """The first file that is not as it was written, in words; empty: all are."""
    try:
        expected = json.loads((folder / NAME).read_text())
        for name, wanted in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            found = _sum(path)
            if found != wanted:
                sizes = f"{wanted[1]} bytes were written, {found[1]} are there"
                return f"{path} is damaged ({sizes}; the checksum differs)"
        if unlisted := {path.name for path in folder.iterdir()} - expected.keys() - {NAME}:
            return f"{folder / NAME} does not list {min(unlisted)}"
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        return f"{folder / NAME} cannot be read ({type(error).__name__}: {error})"
    return ""


def _sum(path: Path) -> list[int]:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = _C.crc32c(block, crc), size + len(block)
    return [crc, size]
