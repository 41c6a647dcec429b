"""What tests see of the host's processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(true: Callable[[], object], what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.01)


def parents() -> dict[int, int]:
    """Every process of the host to its parent."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(folder.name)] = int(fields[1])
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run; the zombies of a dead parent wait for the init of the host."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.add(pid)
    return found


def descendants(of: int) -> set[int]:
    """Processes below ``of``, zombies included."""
    parent = parents()
    found, level = set(), {of}
    while level:
        level = {pid for pid, above in parent.items() if above in level}
        found |= level
    return found


def slots_of(pid: int) -> list[int]:
    """The slots of the pools of process ``pid``."""
    return [
        child
        for child, above in parents().items()
        if above == pid and b"kimi_core.sandbox.slot" in command_line(child)
    ]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
