"""Slots behind one door: any thread runs programs, a few at a time, each in a fresh sandbox."""

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
from kimi_core.sandbox.program import Limits, Result, SandboxUnavailable, Status
from kimi_core.sandbox.selftest import Protection, Report, examine
from kimi_core.sandbox.slot import Request

SLOT_START_S = 60.0
SLOT_END_S = 60.0
_SLOT = "from kimi_core.sandbox.slot import main; main()"
GRACE_S = 60.0
"""Beyond a run's own wall-clock limit: to start its sandbox and to end it, on a busy machine."""


class Pool:
    """Runs programs in sandboxes, at most ``slots`` at a time; safe to use from many threads.

    >>> with Pool(slots=2) as pool:  # doctest: +SKIP
    ...     pool.run("print(int(input()) + 1)", stdin=b"41").stdout
    b'42\\n'

    Args:
        slots: how many programs run side by side; default: the CPUs that this process may use.
        allow_weak: run although the self-test finds a protection missing.
        warm: keep a Python waiting in each idle slot, so that a program begins at once. It costs
            the memory of an interpreter a slot.

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
        """Run one program in a sandbox of its own; see ``kimi_core.sandbox.run``.

        Args:
            wait_s: how long to wait for a free slot; the limits of the run do not count it.
        """
        if self._process != os.getpid():
            raise RuntimeError(
                "This Pool is that of the process that forked this one; make another"
            )
        request = _request(program, stdin, files, limits or Limits())
        try:
            slot = self._idle.get(wait_s)
        except TimeoutError:
            return _infra(f"no slot of the pool was free within {wait_s:g} s")
        try:
            if self._closed:
                raise ValueError("This Pool is closed: no more programs are run")
            return self._run_in(slot, request)
        finally:
            self._idle.put(slot)

    def _run_in(self, slot: "_Slot", request: Request) -> Result:
        try:
            return slot.run(request)
        except _SlotFailedError as error:
            if not self._closed:
                slot.restart()
            return _infra(str(error))
        except BaseException:  # Ctrl-C: a late answer would be taken for that of the next program.
            slot.restart()
            raise

    def _examine(self) -> Report:
        return examine(self.run, self._slots[0].missing)

    def close(self) -> None:
        """End all slots; a program that still runs is killed, and its caller gets INFRA.

        In a fork of the pool's process it does nothing.
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
    """The pool's end of a slot's process, which is started anew when it has failed."""

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
                start_new_session=True,  # Ctrl-C is for the trainer.
            )
        self._connection = ours

    def await_start(self) -> None:
        """Raises SandboxUnavailable if it does not."""
        try:
            answer: list[str] | str = self._receive(SLOT_START_S, "start")
        except _SlotFailedError as error:
            raise SandboxUnavailable(str(error)) from error
        if isinstance(answer, str):
            raise SandboxUnavailable(answer)
        self.missing = answer

    def run(self, request: Request) -> Result:
        """Raises _SlotFailedError if the slot itself fails."""
        try:
            wire.send(self._connection, request, GRACE_S)
        except OSError as error:
            raise _SlotFailedError(f"a slot of the sandbox took no request: {error}") from error
        return self._receive(request.limits.wall_s + GRACE_S, "finish its run")

    def _receive(self, timeout_s: float, what: str) -> Any:
        try:
            return wire.receive(self._connection, timeout_s)
        except TimeoutError as error:
            late = f"a slot of the sandbox did not {what} within {timeout_s:g} s"
            raise _SlotFailedError(late) from error
        except (EOFError, OSError) as error:
            raise _SlotFailedError(f"a slot of the sandbox died and did not {what}") from error

    def restart(self) -> None:
        """Kill the process, and with it its sandbox; start another. If that does not work either,
        the next run says so."""
        self._process.kill()
        self.await_end()
        self._start()
        with contextlib.suppress(SandboxUnavailable):
            self.await_start()

    def hang_up(self) -> None:
        """Have the process end its sandbox and itself; whoever waits for a result is told."""
        with contextlib.suppress(OSError):  # It is gone already.
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


def _request(
    program: str | Sequence[str], stdin: bytes, files: Mapping[str, bytes] | None, limits: Limits
) -> Request:
    """Raises ValueError for what no sandbox could be given."""
    if isinstance(program, str):
        # Text from JSON may hold half a surrogate pair; Python then says what is wrong with it.
        code: bytes | list[str] = program.encode(errors="surrogatepass")
        if "main.py" in (files or {}):
            raise ValueError("File name 'main.py'; allowed is any other, as that is the program's")
    else:
        code = list(program)
        if not code or not code[0] or not all(_passable(argument) for argument in code):
            raise ValueError(f"Command {code!r}; allowed is a program and its arguments")
    for name in files or {}:
        parts = name.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or "\n" in name or not _passable(name):
            raise ValueError(f"File name {name!r}; allowed is a path inside the work folder")
    return Request(code, stdin, dict(files or {}), limits)


def _passable(text: str) -> bool:
    """Whether the kernel can be given it."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


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
        program: Python source, or a command as a list. A command finds the host's ``/usr``.
        stdin: bytes that the program reads; then its stdin ends.
        files: contents by name, put into the work folder, in which the program starts. All are
            executable.
        limits: default ``Limits()``.
        allow_weak: run although the self-test finds a protection missing.

    Raises:
        ValueError: an empty command, or a file name that leaves the work folder.
        SandboxUnavailable: as for ``Pool``.
    """
    return _default_pool(allow_weak).run(program, stdin=stdin, files=files, limits=limits)


def check() -> Report:
    """The self-test: which protections hold on this machine, for this user. Never raises for one
    that does not."""
    try:
        with Pool(1, allow_weak=True) as pool:
            return pool._examine()
    except SandboxUnavailable as error:
        return Report((Protection("a sandbox", False, str(error)),))


@functools.lru_cache(maxsize=2)
def _default_pool(allow_weak: bool) -> Pool:
    pool = Pool(allow_weak=allow_weak)
    atexit.register(pool.close)
    return pool
