"""The cgroup of one slot, in v2 where it is delegated to us, else in v1's hierarchies.

A slot keeps one cgroup for all its runs, one at a time: page cache that a run has touched stays
charged to its cgroup, so that a new one for each run would leave thousands that cannot die.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from kimi_core.sandbox.types import Limits

PREFIX = "kimi-sandbox-"
OVERHEAD = 2  # bwrap and the init of its pid namespace.
_V1 = ("memory", "pids", "cpuacct")


class Cgroup:
    """Folders of cgroupfs that the processes of a slot are put in.

    Args:
        name: of the cgroup, below that of this process.

    Raises:
        OSError: there is no cgroupfs, or its controllers are not ours to use.
    """

    def __init__(self, name: str) -> None:
        self.v2, parents = _parents()
        self.folders = {key: parent / f"{PREFIX}{name}" for key, parent in parents.items()}
        for folder in self.folders.values():
            folder.mkdir(exist_ok=True)
        self.kill()  # What a supervisor that died may have left.
        self._peak = -1
        if self.v2:
            with contextlib.suppress(OSError):  # Before Linux 6.12 it cannot be reset.
                self._peak = os.open(self.folders["memory"] / "memory.peak", os.O_RDWR)
        self._cpu_before, self._oom_before = 0.0, 0

    def begin(self, limits: Limits) -> None:
        """Set the limits of the next run, and count its CPU time and memory from here on."""
        memory = self.folders["memory"]
        if self.v2:
            _write(memory / "memory.max", limits.memory_bytes)
            _try_write(memory / "memory.swap.max", 0)
            _try_write(memory / "memory.oom.group", 1)
        else:
            # Neither may be above the other at any time.
            _try_write(memory / "memory.memsw.limit_in_bytes", -1)
            _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
            _try_write(memory / "memory.memsw.limit_in_bytes", limits.memory_bytes)
        _write(self.folders["pids"] / "pids.max", limits.processes + OVERHEAD)
        self._cpu_before, self._oom_before = self._cpu(), self._oom_kills()
        if not self.v2:
            _write(self.folders["memory"] / "memory.max_usage_in_bytes", 0)
        elif self._peak >= 0:
            os.write(self._peak, b"0")

    def join(self) -> None:
        """Move the calling process in."""
        for folder in self.folders.values():
            _write(folder / "cgroup.procs", 0)

    def cpu_s(self) -> float:
        return self._cpu() - self._cpu_before

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process of this run because memory had run out."""
        return self._oom_kills() > self._oom_before

    def peak_bytes(self) -> int | None:
        """None where the kernel does not tell it of one run."""
        if not self.v2:
            return int((self.folders["memory"] / "memory.max_usage_in_bytes").read_text())
        return int(os.pread(self._peak, 32, 0)) if self._peak >= 0 else None

    def kill(self) -> None:
        """Kill every process inside and wait until they are gone.

        Raises:
            TimeoutError: they are not, after 10 s.
        """
        deadline = time.monotonic() + 10
        while members := {pid for folder in self.folders.values() for pid in _members(folder)}:
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"Processes {sorted(members)} do not die by SIGKILL")
            time.sleep(0.001)

    def close(self) -> None:
        """Kill what is inside and remove the folders."""
        self.kill()
        if self._peak >= 0:
            os.close(self._peak)
        for folder in self.folders.values():
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()

    def _cpu(self) -> float:
        folder = self.folders["cpuacct"]
        if not self.v2:
            return int((folder / "cpuacct.usage").read_text()) / 1e9
        return _table(folder / "cpu.stat")["usage_usec"] / 1e6

    def _oom_kills(self) -> int:
        name = "memory.events" if self.v2 else "memory.oom_control"
        return _table(self.folders["memory"] / name).get("oom_kill", 0)


def leftovers() -> set[str]:
    """Names of the cgroups of slots that exist below this process's, of live and dead ones."""
    _, parents = _parents()
    found = (path.name for parent in parents.values() for path in parent.glob(f"{PREFIX}*"))
    return {name.removeprefix(PREFIX) for name in found}


def _parents() -> tuple[bool, dict[str, Path]]:
    """Whether it is v2, and for each controller the folder that this process is in."""
    own, mounts = _own_paths(), _mounts()
    if "" in mounts:
        folder = mounts[""] / own.get("", "")
        if _delegated(folder):
            return True, dict.fromkeys(_V1, folder)
    missing = [name for name in _V1 if name not in mounts]
    if missing:
        raise OSError(
            f"no cgroup v2 with the memory and pids controllers delegated to this process, and no "
            f"v1 hierarchy of {', '.join(missing)}"
        )
    folders = {name: mounts[name] / own.get(name, "") for name in _V1}
    for name, folder in folders.items():
        if not os.access(folder, os.W_OK):
            raise OSError(f"cgroup {folder} ({name}) is not writable for this user")
    return False, folders


def _delegated(folder: Path) -> bool:
    """Whether cgroups below ``folder`` get the controllers, after asking for them."""
    if not os.access(folder, os.W_OK):
        return False
    control = folder / "cgroup.subtree_control"
    _try_write(control, "+memory +pids +cpu")
    try:
        return {"memory", "pids"} <= set(control.read_text().split())
    except OSError:
        return False


def _own_paths() -> dict[str, str]:
    """Controller (empty: v2) to this process's cgroup, relative."""
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return {name: path.lstrip("/") for _, names, path in lines for name in names.split(",")}


def _mounts() -> dict[str, Path]:
    """Controller (empty: v2) to where its hierarchy is mounted."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        kind, _, options = after.split(" ", 2)
        point = Path(before.split(" ")[4])
        if kind == "cgroup2":
            found[""] = point
        elif kind == "cgroup":
            found.update((name, point) for name in options.split(",") if name in _V1)
    return found


def _table(path: Path) -> dict[str, int]:
    """``name number`` lines."""
    return {k: int(v) for k, v in (line.split() for line in path.read_text().splitlines())}


def _members(folder: Path) -> list[int]:
    try:
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []


def _write(path: Path, value: int | str) -> None:
    # Unbuffered: cgroupfs reports errors at write.
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _try_write(path: Path, value: int | str) -> None:
    """Of a file that not every kernel has, or lets us write."""
    with contextlib.suppress(OSError):
        _write(path, value)
