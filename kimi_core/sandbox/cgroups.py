"""The cgroup of one slot, in v2 if it is delegated to this process, otherwise in v1.

A slot keeps one cgroup for all its runs, one at a time. Page cache that a run has touched stays
charged to its cgroup, so a new cgroup for each run would leave thousands that cannot be removed.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from kimi_core.sandbox.program import Limits

PREFIX = "kimi-sandbox-"
OVERHEAD = 2  # bwrap and the init of its pid namespace.
END_S = 10.0
_NEEDED = {"memory", "pids"}
STARTING = 64  # Processes of a sandbox before its program begins; it has three.
_V1 = ("memory", "pids", "cpuacct")


class Cgroup:
    """The folders of cgroupfs that hold the processes of a slot.

    Args:
        name: name of the cgroup, below that of this process.

    Raises:
        OSError: there is no cgroupfs, or this process may not use its controllers.
    """

    def __init__(self, name: str) -> None:
        self.v2, parents = _parents()
        self.folders = {key: parent / f"{PREFIX}{name}" for key, parent in parents.items()}
        self._fds: dict[str, int] = {}
        for folder in self.folders.values():
            folder.mkdir(exist_ok=True)
        self.kill()  # Processes that a dead slot may have left.
        self._await_reaped()
        join = {folder / "cgroup.procs" for folder in self.folders.values()}
        self.procs = [os.open(path, os.O_WRONLY) for path in join]
        """Descriptors; a pid that is written to them moves into the cgroup."""
        self._limits: Limits | None = None
        self._cpu_before, self._oom_before = 0.0, 0

    def lift(self) -> None:
        """Allow a sandbox to start, whatever the limits of the previous run were."""
        self._write("pids", "pids.max", STARTING)

    def begin(self, limits: Limits) -> None:
        """Set the limits of the next run, and count its CPU time and memory from now on."""
        if limits != self._limits:
            self._set(limits)
            self._limits = limits
        self._write("pids", "pids.max", limits.processes + OVERHEAD)
        self._cpu_before, self._oom_before = self._cpu(), self._oom_kills()
        # v2 before Linux 6.12 cannot reset its peak.
        self._try_write("memory", "memory.peak" if self.v2 else "memory.max_usage_in_bytes", 0)

    def _set(self, limits: Limits) -> None:
        if self.v2:
            self._write("memory", "memory.max", limits.memory_bytes)
            self._try_write("memory", "memory.swap.max", 0)
            self._try_write("memory", "memory.oom.group", 1)
        else:
            # The limit with swap may never be the lower of the two.
            self._try_write("memory", "memory.memsw.limit_in_bytes", -1)
            self._write("memory", "memory.limit_in_bytes", limits.memory_bytes)
            self._try_write("memory", "memory.memsw.limit_in_bytes", limits.memory_bytes)

    def cpu_s(self) -> float:
        return self._cpu() - self._cpu_before

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process of this run for lack of memory."""
        return self._oom_kills() > self._oom_before

    def peak_bytes(self) -> int | None:
        """Peak memory of this run; None if the kernel cannot tell."""
        name = "memory.peak" if self.v2 else "memory.max_usage_in_bytes"
        try:
            return int(self._read("memory", name))
        except PermissionError:
            return None

    def kill(self) -> None:
        """Kill every process inside and wait until all have ended.

        Raises:
            TimeoutError: a process still runs after 10 s.
        """
        deadline = time.monotonic() + END_S
        while members := {pid for folder in self.folders.values() for pid in _members(folder)}:
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _pause(deadline, f"processes {sorted(members)} do not die by SIGKILL")

    def _await_reaped(self) -> None:
        """Wait until the host's init has reaped the processes of a dead slot; until then they
        count."""
        deadline = time.monotonic() + END_S
        count = self.folders["pids"] / "pids.current"
        while count.exists() and int(count.read_text()):
            _pause(deadline, f"dead processes in {count.parent} are not reaped")

    def close(self) -> None:
        """Kill every process inside and remove the folders.

        Raises:
            TimeoutError: as for ``kill``.
        """
        for fd in (*self._fds.values(), *self.procs):
            os.close(fd)
        deadline = time.monotonic() + END_S
        for folder in set(self.folders.values()):
            while True:
                self.kill()
                try:
                    folder.rmdir()
                    break
                except OSError as error:  # Busy until the last process has ended.
                    _pause(deadline, str(error))

    def _cpu(self) -> float:
        if not self.v2:
            return int(self._read("cpuacct", "cpuacct.usage")) / 1e9
        return _table(self._read("cpuacct", "cpu.stat"))["usage_usec"] / 1e6

    def _oom_kills(self) -> int:
        name = "memory.events" if self.v2 else "memory.oom_control"
        return _table(self._read("memory", name)).get("oom_kill", 0)

    def _fd(self, controller: str, name: str) -> int:
        """A descriptor, opened once: a run uses a dozen, and v2 counts the peak per descriptor."""
        if name not in self._fds:
            path = self.folders[controller] / name
            self._fds[name] = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        return self._fds[name]

    def _read(self, controller: str, name: str) -> bytes:
        return os.pread(self._fd(controller, name), 4096, 0)

    def _write(self, controller: str, name: str, value: int) -> None:
        os.pwrite(self._fd(controller, name), str(value).encode(), 0)

    def _try_write(self, controller: str, name: str, value: int) -> None:
        """Write a file that not every kernel has, or lets us write."""
        with contextlib.suppress(OSError):
            self._write(controller, name, value)


def leftovers() -> set[str]:
    """Names of the slots, alive or dead, that have a cgroup below that of this process."""
    _, parents = _parents()
    found = (path.name for parent in parents.values() for path in parent.glob(f"{PREFIX}*"))
    return {name.removeprefix(PREFIX) for name in found}


def _parents() -> tuple[bool, dict[str, Path]]:
    """Whether cgroups are v2, and for each controller the folder of this process."""
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
    """Ask for the controllers below ``folder``; return whether they are granted."""
    if not os.access(folder, os.W_OK):
        return False
    control = folder / "cgroup.subtree_control"
    if not _NEEDED <= set(control.read_text().split()):
        with contextlib.suppress(OSError):  # Not allowed, or the cgroup has processes.
            control.write_text("+memory +pids +cpu")
    return _NEEDED <= set(control.read_text().split())


def _own_paths() -> dict[str, str]:
    """Controller (empty: v2) → relative path of this process's cgroup."""
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return {name: path.lstrip("/") for _, names, path in lines for name in names.split(",")}


def _mounts() -> dict[str, Path]:
    """Controller (empty: v2) → where its hierarchy is mounted."""
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


def _table(text: bytes) -> dict[str, int]:
    """Parse lines of ``name number``."""
    return {k.decode(): int(v) for k, v in (line.split() for line in text.splitlines())}


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"After {END_S:g} s, {what}")
    time.sleep(0.001)


def _members(folder: Path) -> list[int]:
    try:
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []
