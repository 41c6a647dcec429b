"""Calls that Python's os module lacks."""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNET = 0x40000000


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def become_subreaper() -> None:
    """Make orphans among the descendants of this process its children."""
    _checked(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def enter_empty_network() -> None:
    """Put this process into a new network namespace, in which no device is up.

    Raises:
        OSError: the process lacks CAP_SYS_ADMIN.
    """
    _checked(_LIBC.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")
