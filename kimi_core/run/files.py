"""Files and folders that are whole at every instant, also after a crash or a power cut."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a full quota, and a file over the limit."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at ``path``: readers see the old content or the new, also after a crash."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: the file is damaged; the message ends with ``way_out``.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {way_out}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): {way_out}")
    return found


def append_line(path: Path, line: str) -> None:
    """Append a line durably and with one ``write``, so that readers never see two lines mixed.

    Raises:
        OSError: the disk is full, or has another fault.
    """
    content = line.encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    if written < len(content):
        raise OSError(
            f"{path} took {written} of {len(content)} bytes: the disk is full; make room and "
            "continue with --resume, which drops the torn line"
        )


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn safetensors' own errors about the disk back into the OSError that caused them."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code)) from error


def swap(partial: Path, final: Path) -> None:
    """Replace the folder ``final`` by ``partial``; it or its ``.old`` is whole at any instant.

    ``.old`` stays until ``settle``.
    """
    old = final.with_suffix(".old")
    if final.exists():
        discard(old)
        final.rename(old)
    partial.rename(final)


def settle(final: Path) -> None:
    """Force a swap, whose files are on the disk, to the disk, too, and drop what it replaced."""
    sync(final.parent)
    discard(final.with_suffix(".old"))


def put_in_place(partial: Path, final: Path) -> None:
    """Force the folder ``partial`` to the disk, and replace ``final`` by it; then it is there."""
    sync_tree(partial)
    swap(partial, final)
    settle(final)


def finish_swap(final: Path) -> None:
    """Undo a swap that a crash interrupted between its two renames, or drop what it replaced."""
    old = final.with_suffix(".old")
    if old.exists() and not final.exists():
        old.rename(final)
    discard(old)


def discard(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that half of it is never taken for the whole."""
    if folder.exists():
        rubbish = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(rubbish, ignore_errors=True)
        folder.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a killed process has left half-written below ``folder``: names in ``.tmp``."""
    for path in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_run(path: Path) -> None:
    """Refuse what is not the folder of a run.

    Raises:
        ValueError: it has no config.toml.
    """
    if not (path / "config.toml").is_file():
        raise ValueError(f"{path} is not the folder of a run: it has no config.toml")
