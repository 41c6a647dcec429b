"""Faults of the disk on which a run writes, in words that name the way out."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_core.run.files import OUT_OF_ROOM

FAULTS = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
"""Error numbers of a disk that is broken or not connected."""


@contextmanager
def disk_faults_named(folder: Path) -> Iterator[None]:
    """Say what is wrong with the disk of ``folder``, a run's, and what to do.

    Raises:
        OSError: what was raised inside, with a message that names the way out if the disk is full,
            read-only, broken or gone.
    """
    try:
        yield
    except OSError as error:
        said = "" if "make room" in str(error) else _said(error, folder)
        if not said:
            raise
        raise OSError(
            error.errno,
            f"{said} ({error.filename or error.strerror}). {_todo(error)}; then --resume goes on "
            "from the last saved state",
        ) from error


def _said(error: OSError, folder: Path) -> str:
    if error.errno in OUT_OF_ROOM:
        above = next(one for one in (folder, *folder.parents) if one.exists())
        free = shutil.disk_usage(above).free / 1e6
        return f"Cannot write in {folder}: the disk is full, {free:.1f} MB are free"
    if error.errno == errno.EROFS:
        return f"Cannot write in {folder}: the disk is read-only"
    if error.errno in FAULTS:
        return f"Cannot write in {folder}: the disk has a fault, {error.strerror}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not folder.is_dir():
        return f"The folder {folder} of this run has vanished"
    return ""


def _todo(error: OSError) -> str:
    if error.errno in OUT_OF_ROOM:
        return "Make room there"
    if error.errno == errno.EROFS:
        return "Make it writable"
    return "Mount its disk, or put the folder back"
