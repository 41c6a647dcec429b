"""Supervises one program: feeds stdin, drains the output, kills at a limit, finds the status."""

import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from kimi_core.sandbox.cgroups import Cgroup
from kimi_core.sandbox.program import Limits, Result, Status
from kimi_core.sandbox.sandbox import Sandbox, readable

TICK_S = 0.05
"""Seconds between two looks at limits that cause no event."""
DRAIN = 16
"""A program is killed when it has written its limit of output this many times."""
DRAIN_S = 10.0
LONGEST_WAIT = 20
"""A program that still waits for a core after this many times its limit has no verdict."""
MAX_FILES = 20_000
"""Files that a program may make without a cgroup; each takes kernel memory."""
_EXEC_FAILED = b"bwrap: execvp"
_OUT_OF_MEMORY = (
    b"MemoryError",
    b"terminate called after throwing an instance of 'std::bad_alloc'",
)


class Abandoned(Exception):
    """The pool that wanted the result has ended."""


@dataclass
class _Output:
    """The output on one pipe; its first ``limit`` bytes are kept."""

    fd: int
    limit: int
    kept: bytearray = field(default_factory=bytearray)
    total: int = 0
    open: bool = True

    def read(self) -> None:
        data = os.read(self.fd, 1 << 16)
        self.open = bool(data)
        self.total += len(data)
        self.kept += data[: self.limit - len(self.kept)]


class _Spent:
    """Wall-clock time of a program, without the time that it could have run but had no core.

    The kernel forgets how long a thread has waited when the thread ends. So the waits are read at
    each look, and the longest wait since the look before does not count.
    """

    def __init__(self, limit_s: float, now: float) -> None:
        self.wall_s = 0.0
        self._limit_s, self._last = limit_s, now
        self._waits: dict[int, float] = {}
        self.next_look = now + min(TICK_S, limit_s)

    def look(self, sandbox: Sandbox, now: float) -> None:
        waits = sandbox.waits_for_a_core()
        longest = max((w - self._waits.get(thread, 0.0) for thread, w in waits.items()), default=0)
        # A wait is told when it ends, so it may be longer than the time since the last look.
        self.wall_s = max(0.0, self.wall_s + now - self._last - longest)
        self._waits, self._last = waits, now
        self.next_look = now + min(TICK_S, max(0.001, self._limit_s - self.wall_s))


def supervise(
    sandbox: Sandbox,
    stdin: bytes,
    limits: Limits,
    cgroup: Cgroup | None,
    owners: tuple[int, ...],
) -> Result:
    """Run the program of ``sandbox`` until all its processes have ended.

    Args:
        stdin: bytes that the program reads; then its stdin ends.
        owners: descriptors that become readable when nobody wants the result any more: the pidfd
            of the pool's process, and the connection to it.

    Raises:
        Abandoned: nobody wants the result any more.
        TimeoutError: the sandbox does not end although it was killed.
    """
    outputs = [_Output(fd, limits.output_bytes) for fd in (sandbox.stdout, sandbox.stderr)]
    started = time.monotonic()
    try:
        stopped = _until_end(sandbox, memoryview(stdin), outputs, limits, cgroup, owners)
    finally:
        sandbox.kill()  # Safe if it has ended already.
    wall_s = time.monotonic() - started
    _drain(outputs)
    code, usage = sandbox.reap()
    cpu_s = cgroup.cpu_s() if cgroup else usage.cpu_s
    peak = cgroup.peak_bytes() if cgroup else None
    stdout, stderr = (bytes(output.kept) for output in outputs)
    if cgroup and cgroup.out_of_memory():
        stopped = Status.MEMORY, "the kernel killed a process at the limit of memory"
    if stopped:
        code = None
    status, detail = stopped or _judge(code, cpu_s, limits, stderr)
    if status is not Status.MEMORY and any(output.total > output.limit for output in outputs):
        status, detail = Status.OUTPUT, f"more than {limits.output_bytes} bytes of output"
    return Result(status, code, stdout, stderr, cpu_s, wall_s, peak or usage.peak_bytes, detail)


def _until_end(
    sandbox: Sandbox,
    stdin: memoryview,
    outputs: list[_Output],
    limits: Limits,
    cgroup: Cgroup | None,
    owners: tuple[int, ...],
) -> tuple[Status, str] | None:
    """Serve the pipes until the sandbox has ended, or until a limit requires to kill it."""
    os.set_blocking(sandbox.stdin, False)
    poll = select.poll()
    poll.register(sandbox.end, select.POLLIN)
    for owner in owners:
        poll.register(owner, select.POLLIN)
    poll.register(sandbox.stdin, select.POLLOUT)
    for output in outputs:
        poll.register(output.fd, select.POLLIN)
    now = started = time.monotonic()
    spent = _Spent(limits.wall_s, now)
    while True:
        ready = {fd for fd, _ in poll.poll(1e3 * max(0.0, spent.next_look - now))}
        if not ready.isdisjoint(owners):
            raise Abandoned
        for output in outputs:
            if output.fd in ready:
                output.read()
                if not output.open:
                    poll.unregister(output.fd)
        if sandbox.stdin in ready:
            stdin = _feed(sandbox.stdin, stdin)
            if not stdin:
                poll.unregister(sandbox.stdin)
                sandbox.close_stdin()
        if sandbox.end in ready:
            return None
        now = time.monotonic()
        if any(output.total > DRAIN * output.limit for output in outputs):
            return Status.OUTPUT, ""
        if now >= spent.next_look:
            if over := _over(sandbox, limits, cgroup):
                return over
            spent.look(sandbox, now)
            if spent.wall_s >= limits.wall_s:
                return Status.TIME, f"wall-clock time of {limits.wall_s:g} s"
            if now >= started + LONGEST_WAIT * limits.wall_s:
                return Status.INFRA, f"no core was free for most of {now - started:.0f} s"


def _feed(fd: int, data: memoryview) -> memoryview:
    """Write as much as the pipe takes and return the rest; empty if nobody reads."""
    try:
        return data[os.write(fd, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _drain(outputs: list[_Output]) -> None:
    """Read what ended processes have left in the pipes."""
    deadline = time.monotonic() + DRAIN_S
    for output in outputs:
        while output.open and readable(output.fd, deadline):
            output.read()


def _over(sandbox: Sandbox, limits: Limits, cgroup: Cgroup | None) -> tuple[Status, str] | None:
    """A limit that is reached and does not stop the program by itself."""
    if cgroup is None:
        return _over_by_proc(sandbox, limits)
    if cgroup.out_of_memory():  # v1 kills one process and not the others.
        return Status.MEMORY, ""
    if cgroup.cpu_s() > limits.cpu_s:
        return Status.TIME, f"CPU time of {limits.cpu_s:g} s"
    return None


def _over_by_proc(sandbox: Sandbox, limits: Limits) -> tuple[Status, str] | None:
    """``_over`` without a cgroup. It looks from outside, so fast changes between looks get
    through."""
    used = 0
    for pid in sandbox.tree():
        try:
            resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        used += (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")
    for folder in ("box", "tmp", "dev/shm"):
        try:
            state = os.statvfs(f"/proc/{sandbox.init}/root/{folder}")
        except (FileNotFoundError, ProcessLookupError):
            continue
        used += (state.f_blocks - state.f_bfree) * state.f_frsize
        if state.f_files - state.f_ffree > MAX_FILES:
            return Status.MEMORY, f"more than {MAX_FILES} files"
    if used > limits.memory_bytes:
        return Status.MEMORY, f"memory of {limits.memory_bytes} bytes"
    return None


def _judge(code: int | None, cpu_s: float, limits: Limits, stderr: bytes) -> tuple[Status, str]:
    """The status of a program that ended by itself."""
    if code is None:
        if stderr.startswith(_EXEC_FAILED):
            return Status.RUNTIME, "the program cannot be executed"
        return Status.INFRA, f"the sandbox ended early: {stderr[-300:].decode(errors='replace')}"
    if code == 0:
        return Status.OK, ""
    stopped = code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    if cpu_s >= limits.cpu_s * (0.9 if stopped else 1):  # The kernel's two clocks differ slightly.
        return Status.TIME, f"CPU time of {limits.cpu_s:g} s"
    last = stderr.rstrip().rsplit(b"\n", 1)[-1]
    if last.startswith(_OUT_OF_MEMORY) or _OUT_OF_MEMORY[1] in stderr:
        # The program says so itself, but it failed in any case.
        return Status.MEMORY, "the program ran out of memory"
    return Status.RUNTIME, f"exit code {code}"
