"""One sandbox: bubblewrap's process tree, its pipes, its limits and its end.

The tree is bwrap, the init of its pid namespace, and the program below. bwrap sets everything up
and waits on a pipe. Then the limits are put on init, and only then does the program begin. bwrap
reports whether it did, and its exit code, on a pipe that no process inside holds.
"""

import contextlib
import json
import math
import os
import resource
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_core import _C
from kimi_core.sandbox import bubblewrap, seccomp
from kimi_core.sandbox.cgroups import Cgroup
from kimi_core.sandbox.program import MB, Limits

START_S = 30.0
"""Seconds that a sandbox may take to be ready, on a busy machine."""
END_S = 30.0
"""Seconds that its processes may take to end after a SIGKILL."""
READY = b"\n"
"""Bytes that the Python of ``inside/start.py`` writes to stdout when it listens."""
_INSIDE = (Path(__file__).with_name("inside") / "start.py").read_text()


class StartError(RuntimeError):
    """A sandbox did not become ready; the message has bwrap's output."""


@dataclass(frozen=True)
class Identity:
    """What the sandboxes of one slot have in common: their user, cgroup and network."""

    uid: int | None
    """The user that bwrap runs as; None: the user of this process."""
    cgroup: Cgroup | None
    own_network: bool
    """Whether each sandbox makes a network namespace. If not, that of the slot is empty."""


@dataclass(frozen=True)
class Usage:
    """What the processes of a sandbox used, once they are reaped."""

    cpu_s: float
    peak_bytes: int
    """Peak memory of the largest process."""


class Sandbox:
    """A sandbox whose program waits for ``go``.

    Args:
        argv: the program and its arguments, with paths inside the sandbox.
        files: name → content, relative to the work folder.

    Raises:
        StartError: bwrap ended, or was not ready within ``START_S``.
    """

    def __init__(self, identity: Identity, argv: Sequence[str], files: Mapping[str, bytes]) -> None:
        self._identity = identity
        self._fds: set[int] = set()
        inner_in, self.stdin = self._own(os.pipe(), 1)
        self.stdout, inner_out = self._own(os.pipe(), 0)
        self.stderr, inner_err = self._own(os.pipe(), 0)
        inner_block, self._block = self._own(os.pipe(), 1)
        self._report, inner_report = self._own(os.pipe(), 0)
        rules = _in_memory(seccomp.program())
        contents = [(_in_memory(data), name) for name, data in files.items()]
        standard = (inner_in, inner_out, inner_err)
        others = (inner_block, inner_report, rules, *(fd for fd, _ in contents))
        command = bubblewrap.command(
            own_network=identity.own_network,
            files=contents,
            fds={"seccomp": rules, "block": inner_block, "json-status": inner_report},
        )
        if identity.cgroup:
            identity.cgroup.lift()
        try:
            self._bwrap = _C.spawn(
                [bubblewrap.find_bwrap(), *command[1:], *argv],
                standard=standard,
                inherited=others,
                cgroup_procs=identity.cgroup.procs if identity.cgroup else (),
                user=identity.uid,
            )
        except OSError as error:
            self.close()
            raise StartError(f"The sandbox did not start: {error}") from error
        finally:
            for fd in (*standard, *others):
                os.close(fd)
        (self._bwrap_end,) = self._own((os.pidfd_open(self._bwrap),), 0)
        self._reported = b""
        try:
            self.init = self._await_init()
            (self.end,) = self._own((os.pidfd_open(self.init),), 0)
        except BaseException:
            self._reap_children(kill=True)
            self.close()
            raise

    def _own(self, fds: tuple[int, ...], ours: int) -> tuple[int, ...]:
        self._fds.add(fds[ours])
        return fds

    def _await_init(self) -> int:
        deadline = time.monotonic() + START_S
        while b"\n" not in self._reported:
            if not readable(self._report, deadline):
                raise StartError(f"The sandbox was not ready within {START_S:g} s")
            data = os.read(self._report, 4096)
            if not data:
                said = os.read(self.stderr, 4096) if readable(self.stderr, deadline) else b""
                raise StartError(f"The sandbox did not start: {said.decode(errors='replace')}")
            self._reported += data
        return int(json.loads(self._reported.split(b"\n")[0])["child-pid"])

    def limit(self, limits: Limits) -> None:
        """Put the limits on init and on the processes below it; new processes inherit them."""
        values = {
            resource.RLIMIT_NPROC: limits.processes + 1,  # init counts, too.
            resource.RLIMIT_FSIZE: limits.file_bytes,
            resource.RLIMIT_NOFILE: limits.open_files,
            resource.RLIMIT_CPU: math.ceil(limits.cpu_s),
            resource.RLIMIT_CORE: 1,  # Unlike 0, it also stops handlers behind a pipe.
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_SIGPENDING: 256,
            resource.RLIMIT_MEMLOCK: MB,
        }
        if self._identity.cgroup is None:
            values[resource.RLIMIT_AS] = limits.memory_bytes
        with _limiting(self._identity.uid):
            for pid in self.tree():
                for kind, value in values.items():
                    _lower(pid, kind, value)

    def go(self) -> None:
        """Let the program begin."""
        os.write(self._block, b"x")

    @property
    def dead(self) -> bool:
        """Whether every process of the namespace has ended."""
        return bool(select.select([self.end], [], [], 0)[0])

    def tree(self) -> list[int]:
        """Pids on the host of the processes in the namespace, init first."""
        found = [self.init]
        for pid in found:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += _children(pid)
        return found

    def waits_for_a_core(self) -> dict[int, float]:
        """Seconds that each living thread was ready to run while other work had the cores."""
        waits = {}
        for pid in self.tree():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/schedstat", "rb") as file:
                        waits[int(task)] = int(file.read().split()[1]) / 1e9
        return waits

    def kill(self) -> None:
        """End init, and with it every process of its namespace."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.end, signal.SIGKILL)

    def close_stdin(self) -> None:
        """End the program's stdin. Safe to call twice."""
        if self.stdin in self._fds:
            self._fds.remove(self.stdin)
            os.close(self.stdin)

    def reap(self) -> tuple[int | None, Usage]:
        """Wait until every process has ended; return exit code and usage.

        The exit code is None if the program never began.

        Raises:
            TimeoutError: a process does not end although init was killed.
        """
        usage = self._reap_children()
        while data := os.read(self._report, 4096):
            self._reported += data
        reports = [json.loads(line) for line in self._reported.splitlines()]
        return next((r["exit-code"] for r in reports if "exit-code" in r), None), usage

    def _reap_children(self, *, kill: bool = False) -> Usage:
        """Wait for bwrap and for init, which bwrap leaves behind and we inherit as subreaper.

        Args:
            kill: kill each of them first, because an init that has just begun does not end with
                bwrap.
        """
        deadline = time.monotonic() + END_S
        cpu_s, peak = 0.0, 0
        if not kill:
            readable(self._bwrap_end, deadline)
        while True:
            for pid in _children(os.getpid()) if kill else ():
                os.kill(pid, signal.SIGKILL)  # It is not reaped yet, so its pid is not reused.
            try:
                pid, _, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return Usage(cpu_s, peak)
            if pid:
                cpu_s += used.ru_utime + used.ru_stime
                peak = max(peak, used.ru_maxrss << 10)
            elif time.monotonic() > deadline:
                raise TimeoutError(f"The sandbox's processes have not ended within {END_S:g} s")
            else:
                time.sleep(0.001)

    def close(self) -> None:
        """Close the descriptors; the processes must have been reaped."""
        while self._fds:
            os.close(self._fds.pop())


def start_python(identity: Identity) -> Sandbox:
    """A sandbox with a Python that waits for its program on stdin.

    Raises:
        StartError: the sandbox did not start within ``START_S``.
    """
    sandbox = Sandbox(identity, [bubblewrap.find_python(), "-SB", "-c", _INSIDE], {})
    sandbox.go()
    return sandbox


def await_ready(sandbox: Sandbox) -> None:
    """Wait until the Python of ``start_python`` listens.

    Raises:
        StartError: the Python was not ready within ``START_S``.
    """
    deadline = time.monotonic() + START_S
    if not readable(sandbox.stdout, deadline):
        raise StartError(f"Python in the sandbox was not ready within {START_S:g} s")
    if os.read(sandbox.stdout, 1) != READY:
        said = os.read(sandbox.stderr, 4096) if readable(sandbox.stderr, deadline) else b""
        raise StartError(f"Python did not start in the sandbox: {said.decode(errors='replace')}")


@contextlib.contextmanager
def _limiting(uid: int | None) -> Iterator[None]:
    """Take ``uid`` as real ids. prlimit looks at these, and root in a container may lack the
    capability (CAP_SYS_RESOURCE) to limit other processes."""
    if uid is None:
        yield
        return
    os.setresgid(uid, -1, -1)
    os.setresuid(uid, -1, -1)
    try:
        yield
    finally:
        os.setresuid(0, -1, -1)
        os.setresgid(0, -1, -1)


def _lower(pid: int, kind: int, value: int) -> None:
    """Lower a limit. A limit that is lower already stays as it is."""
    soft, hard = resource.prlimit(pid, kind)
    if hard == resource.RLIM_INFINITY or hard > value:
        # CPU time has a second between SIGXCPU and SIGKILL.
        hard = value + (kind == resource.RLIMIT_CPU)
        resource.prlimit(pid, kind, (value, hard))
    elif soft == resource.RLIM_INFINITY or soft > value:
        resource.prlimit(pid, kind, (value, hard))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", "rb") as children:
            found += map(int, children.read().split())
    return found


def _in_memory(data: bytes) -> int:
    """A descriptor that reads ``data``."""
    fd = os.memfd_create("sandbox")
    with open(fd, "wb", buffering=0, closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def readable(fd: int, deadline: float) -> bool:
    """Whether data or an end comes before ``deadline`` of the monotonic clock."""
    return bool(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0])
