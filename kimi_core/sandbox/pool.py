"""A thread-safe pool of sandbox workers; each program gets a fresh sandbox."""

import atexit
import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kimi_core.sandbox import seccomp, wire
from kimi_core.sandbox.bubblewrap import find_bwrap, find_python
from kimi_core.sandbox.fair import FairQueue
from kimi_core.sandbox.program import Limits, Program, Result, SandboxUnavailable, Status
from kimi_core.sandbox.selftest import Protection, SelfTest, examine

SLOT_START_S = 60.0
SLOT_END_S = 60.0
_SLOT = "from kimi_core.sandbox.slot import main; main()"
GRACE_S = 60.0
"""Seconds beyond a program's wall-clock limit, to start and end its sandbox on a busy machine."""


class Pool:
    """Runs programs in sandboxes, at most ``slots`` at a time; safe to use from many threads.

    >>> with Pool(slots=2) as pool:  # doctest: +SKIP
    ...     pool.run("print(int(input()) + 1)", stdin=b"41").stdout
    b'42\\n'

    Args:
        slots: programs that run at the same time; default: the CPUs that this process may use.
        allow_weak: run although a protection is missing.
        warm: keep a Python waiting in each idle slot, so that a program begins at once. This costs
            the memory of one interpreter per slot.

    Raises:
        SandboxUnavailable: bubblewrap is missing or does not work here, or a protection is missing.
        ValueError: fewer than 1 slot.
    """

    def __init__(
        self, slots: int | None = None, *, allow_weak: bool = False, warm: bool = True
    ) -> None:
        count = len(os.sched_getaffinity(0)) if slots is None else slots
        if count < 1:
            raise ValueError(f"Pool of {count} slots; allowed is 1 or more")
        find_bwrap(), find_python(), seccomp.program()
        self._idle: FairQueue[_Slot] = FairQueue()
        self._slots: list[_Slot] = []
        self._closed, self._process = False, os.getpid()
        try:
            self._slots = [_Slot(warm) for _ in range(count)]
            for slot in self._slots:
                slot.await_start()
                self._idle.put(slot)
            if not allow_weak:
                self._examine().require()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        program: str | Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        wait_s: float = 3600.0,
    ) -> Result:
        """Run one program in a fresh sandbox; see ``kimi_core.sandbox.run``.

        Args:
            wait_s: longest wait for a free slot, seconds; it does not count in the limits.
        """
        if self._process != os.getpid():
            raise RuntimeError(
                "This Pool belongs to the process that forked this one; make another"
            )
        given = Program(program, stdin, files or {}, limits or Limits())
        try:
            slot = self._idle.get(wait_s)
        except TimeoutError:
            return _infra(f"no slot of the pool was free within {wait_s:g} s")
        try:
            if self._closed:
                raise ValueError("This Pool is closed; make another")
            return self._run_in(slot, given)
        finally:
            self._idle.put(slot)

    def _run_in(self, slot: "_Slot", program: Program) -> Result:
        try:
            return slot.run(program)
        except _SlotFailedError as error:
            if not self._closed:
                slot.restart()
            return _infra(str(error))
        except BaseException:  # Ctrl-C: the answer would otherwise go to the next program.
            slot.restart()
            raise

    def _examine(self) -> SelfTest:
        return examine(self.run, self._slots[0].missing)

    def close(self) -> None:
        """End all slots. A running program is killed, and its caller gets INFRA.

        Does nothing in a fork of the pool's process. Safe to call twice.
        """
        if self._process != os.getpid():
            return
        self._closed = True
        for slot in self._slots:
            slot.hang_up()
        for slot in self._slots:
            slot.await_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Slot:
    """The process of a slot as the pool sees it. A process that failed is replaced."""

    def __init__(self, warm: bool) -> None:
        self._warm = warm
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SLOT, str(theirs.fileno()), str(int(self._warm))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the trainer.
            )
        self._connection = ours

    def await_start(self) -> None:
        """Wait until the process is ready. Raises SandboxUnavailable if it does not start."""
        try:
            answer: list[str] | str = self._receive(SLOT_START_S, "start")
        except _SlotFailedError as error:
            raise SandboxUnavailable(str(error)) from error
        if isinstance(answer, str):
            raise SandboxUnavailable(answer)
        self.missing = answer

    def run(self, program: Program) -> Result:
        """Run one program. Raises _SlotFailedError if the slot itself fails."""
        try:
            wire.send(self._connection, program, GRACE_S)
        except OSError as error:
            raise _SlotFailedError(f"a slot of the sandbox took no request: {error}") from error
        return self._receive(program.limits.wall_s + GRACE_S, "finish its run")

    def _receive(self, timeout_s: float, what: str) -> Any:
        try:
            return wire.receive(self._connection, timeout_s)
        except TimeoutError as error:
            late = f"a slot of the sandbox did not {what} within {timeout_s:g} s"
            raise _SlotFailedError(late) from error
        except (EOFError, OSError) as error:
            raise _SlotFailedError(f"a slot of the sandbox died and did not {what}") from error

    def restart(self) -> None:
        """Kill the process and its sandbox, and start another; the next run reports a failure."""
        self._process.kill()
        self.await_end()
        self._start()
        with contextlib.suppress(SandboxUnavailable):
            self.await_start()

    def hang_up(self) -> None:
        """Make the process end its sandbox and itself; a waiting caller gets an error."""
        with contextlib.suppress(OSError):  # It has ended already.
            self._connection.shutdown(socket.SHUT_RDWR)

    def await_end(self) -> None:
        try:
            self._process.wait(SLOT_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()


class _SlotFailedError(RuntimeError):
    """The process of a slot died or does not answer."""


def _infra(detail: str) -> Result:
    return Result(Status.INFRA, None, b"", b"", 0.0, 0.0, 0, detail)


def run(
    program: str | Sequence[str],
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes] | None = None,
    limits: Limits | None = None,
    allow_weak: bool = False,
) -> Result:
    """Run one program in a fresh sandbox, on a pool that this process keeps until it ends.

    Args:
        program, stdin, files, limits: the fields of ``Program``.
        allow_weak: run although a protection is missing.

    Raises:
        ValueError: as ``Program`` raises it.
        SandboxUnavailable: as for ``Pool``.
    """
    return _default_pool(allow_weak).run(program, stdin=stdin, files=files, limits=limits)


def check() -> SelfTest:
    """Test which protections hold on this machine, for this user. A missing one is no error."""
    try:
        with Pool(1, allow_weak=True) as pool:
            return pool._examine()
    except SandboxUnavailable as error:
        return SelfTest((Protection("a sandbox", False, str(error)),))


@functools.lru_cache(maxsize=2)
def _default_pool(allow_weak: bool) -> Pool:
    pool = Pool(allow_weak=allow_weak)
    atexit.register(pool.close)
    return pool
