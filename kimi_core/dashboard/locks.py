"""Whether a process holds the lock of a run, found out without taking the lock.

To try the lock is to hold it for an instant, and a run that starts in this instant would be
refused. Linux lists every lock in ``/proc/locks``. Elsewhere the process whose pid is in the file
counts as the holder while it lives.
"""

import os
from pathlib import Path

LOCKS = Path("/proc/locks")


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds the ``flock`` on that file."""
    try:
        inode = lock.stat().st_ino
        if LOCKS.exists():
            lines = [line.split() for line in LOCKS.read_text().splitlines()]
            return any("FLOCK" in line and _inode(line) == inode for line in lines)
        return _is_alive(int(lock.read_text()))
    except (OSError, ValueError):
        return False


def _inode(line: list[str]) -> int | None:
    """The inode of ``1: FLOCK ADVISORY WRITE 8667 fe:00:2147451 0 EOF``."""
    place = next((word for word in line if word.count(":") == 2), "")
    return int(place.rpartition(":")[2]) if place else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # Signal 0 asks whether the process is there.
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
