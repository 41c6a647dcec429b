"""The process in which math-verify compares answers: ``python -m … SOCKET_FD MEMORY_MB``.

It sends ``"ready"`` once everything is imported. Then each message is ``{"reference": …,
"answer": …, "cpu_s": …, "wall_s": …}``. The reply is ``true``, ``false``, or the reason why there
is no verdict: ``"time"``, ``"memory"`` or ``"crash"``. The process ends when the connection ends.

A fork of this process compares, because an answer may be anything. This process parses no answer,
so it cannot hang or die. A fork lives until a limit ends it, its memory has grown, or it has
answered ``REQUESTS``: it keeps what sympy has cached, which makes a comparison twice as fast as in
a fork for each request. What cannot be read is ``false``. Nothing is evaluated as Python: only the
LaTeX parser of math-verify is used.
"""

import ctypes
import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from kimi_core.reward.workers import PR_SET_PDEATHSIG

REQUESTS = 1000
"""Most comparisons of one fork."""

GROWTH_MB = 128
"""Address space that a fork may gain before it is replaced."""

WARM_UP = [
    ("a^2-4", "(a+2)(a-2)"),
    (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt{5}+1}{2}"),
    (r"\{1, -2\}", "x = 1, y = 2"),
    (r"(-\infty, 3)\cup[4, 5)", "x < 3"),
    (r"\sin^2(2x) + e^{3}", r"2\pi \cdot \log_2 8"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
]
"""Parsing these once fills the parser's caches, which every fork then inherits."""


def main() -> None:
    """Serve until the connection ends."""
    connection, memory_mb = Connection(int(sys.argv[1])), int(sys.argv[2])
    logging.disable(logging.CRITICAL)  # math-verify warns that it keeps no time limit.
    for reference, answer in WARM_UP:
        equal(reference, answer)
    gc.freeze()  # Pages that no process writes to are not copied.
    connection.send_bytes(b'"ready"')
    fork: Fork | None = None
    try:
        while True:
            request = json.loads(connection.recv_bytes())
            fork = fork or Fork(memory_mb)
            connection.send_bytes(json.dumps(fork.ask(request, connection)).encode())
            fork = fork if fork.is_alive else None
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        if fork is not None:
            fork.end()


def equal(reference: str, answer: str) -> bool:
    """Whether two cleaned answers are equal. Imported late, because sympy takes a second."""
    from kimi_core.reward.math.compare import equal

    return equal(reference, answer)


class Fork:
    """A copy of this process that compares answers until one of them ends it."""

    def __init__(self, memory_mb: int) -> None:
        self._pipe, theirs = Pipe()
        worker = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._pipe.close()
            _serve(theirs, memory_mb, worker)
        theirs.close()
        self.is_alive = True

    def ask(self, request: dict[str, Any], connection: Connection) -> bool | str:
        """The verdict on one request, or why there is none.

        Raises:
            EOFError: the other side of ``connection`` has ended.
        """
        said = None
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            ready = wait([self._pipe, connection], timeout=request["wall_s"])
            if self._pipe in ready:
                said = json.loads(self._pipe.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            ready = [self._pipe]
        if said is None:
            status = self.end()
            if connection in ready:
                raise EOFError
            if not ready or os.WTERMSIG(status) == signal.SIGPROF:
                return "time"
            # A stack that overflows is the answer's doing.
            return False if os.WTERMSIG(status) == signal.SIGSEGV else "crash"
        verdict, goes_on = said
        if not goes_on:
            self.end()
        return verdict

    def end(self) -> int:
        """Kill the fork if it lives, and return its wait status. Call it once."""
        self.is_alive = False
        self._pipe.close()
        os.kill(self._pid, signal.SIGKILL)
        return os.waitpid(self._pid, 0)[1]


def _serve(pipe: Connection, memory_mb: int, worker: int) -> None:
    """The work of a fork: ``[verdict, whether it goes on]`` for each request. Never returns."""
    try:
        faulthandler.disable()  # A stack that overflows is nothing to report.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            return  # The worker died before the line above.
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        start_mb = _peak_mb()
        for answered in range(1, REQUESTS + 1):
            request = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # SIGPROF ends the process.
            verdict = _verdict(request["reference"], request["answer"])
            signal.setitimer(signal.ITIMER_PROF, 0)
            # math-verify reports any exception as "not equal", also a lack of memory.
            peak_mb = _peak_mb()
            if peak_mb > memory_mb / 2:
                verdict = "memory"
            goes_on = answered < REQUESTS and peak_mb < start_mb + GROWTH_MB
            pipe.send_bytes(json.dumps([verdict, goes_on]).encode())
    finally:
        os._exit(0)


def _verdict(reference: str, answer: str) -> bool | str:
    try:
        return equal(reference, answer)
    except MemoryError:
        return "memory"
    except Exception:  # noqa: BLE001  # math-verify or sympy cannot read it, whatever they raise.
        return False


def _peak_mb() -> float:
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmPeak"))
    return int(peak.split()[1]) / 1024


if __name__ == "__main__":
    main()
