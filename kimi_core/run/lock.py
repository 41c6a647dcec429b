"""The lock of a folder: one process at a time works there, and the kernel knows which."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def take_lock(path: Path) -> int:
    """Lock ``path/lock`` and write our pid into it; closing the descriptor releases the lock.

    Raises:
        ValueError: another process holds it.
    """
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = _holder(path / "lock", os.read(lock, 32).decode(errors="replace").strip())
        os.close(lock)
        raise ValueError(
            f"{path} is in use by {said}: wait for it or stop it, or give this run another name=..."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _holder(lock: Path, pid: str) -> str:
    """The process that holds the lock. Its owner wrote ``pid``; a fork may have outlived it."""
    living = [process.name for process in Path("/proc").glob("[0-9]*") if _has_open(process, lock)]
    if pid in living or not living:
        return f"the process with pid {pid or 'unknown'}"
    return f"a fork of the dead process {pid}, which has the pid {' and '.join(living)}"


def _has_open(process: Path, path: Path) -> bool:
    if process.name == str(os.getpid()):
        return False  # We have opened it to ask.
    with suppress(OSError):  # It has ended, or belongs to another user.
        for handle in (process / "fd").iterdir():
            with suppress(OSError):  # It was closed meanwhile.
                if handle.samefile(path):
                    return True
    return False
