"""The process in which math-verify compares answers: ``python -m … SOCKET_FD MEMORY_MB``.

It sends ``"ready"`` once everything is imported. Then each message is ``{"reference": …,
"answer": …, "cpu_s": …, "wall_s": …}``. The reply is ``true``, ``false``, or the reason why there
is no verdict: ``"time"``, ``"memory"`` or ``"crash"``. The process ends when the connection ends.

A fork of this process works on each request, which costs milliseconds because everything is loaded
already. Whatever an answer does, it does to that fork. This process parses no answer, so it cannot
hang or die, and the next request starts fresh. Nothing is evaluated as Python: only the LaTeX
parser of math-verify is used.
"""

import ctypes
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

PR_SET_PDEATHSIG = 1

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
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_in_a_fork(request, memory_mb, connection)).encode())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify finds ``answer`` equal to ``reference``; both are cleaned.

    math-verify reads i as a variable, so (1+i)² would not be 2i. Here i is the imaginary unit.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, MatrixBase

    def read(text: str) -> list[Any]:
        whole = [LatexExtractionConfig(boxed_match_priority=-1)]
        # A dollar inside would make several formulas, of which the last one counts.
        text = text.replace(r"\$", "").replace("$", "")
        found = parse(f"${text}$", whole, parsing_timeout=None)
        return [
            one.subs({symbol: I for symbol in one.free_symbols if symbol.name == "i"})
            if isinstance(one, Basic | MatrixBase)
            else one
            for one in found
        ]

    return verify(read(reference), read(answer), timeout_seconds=None, allow_set_relation_comp=True)


def _in_a_fork(request: dict[str, Any], memory_mb: int, connection: Connection) -> bool | str:
    """The verdict of a fork on one request.

    Raises:
        EOFError: the other side has ended meanwhile.
    """
    verdict, write_end = Pipe(duplex=False)
    worker = os.getpid()
    child = os.fork()
    if child == 0:
        _answer(request, memory_mb, write_end, worker)
    write_end.close()
    try:
        ready = wait([verdict, connection], timeout=request["wall_s"])
        said = _read(verdict) if verdict in ready else None
    finally:
        verdict.close()
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if said is not None:
        return json.loads(said)
    if verdict not in ready and ready:
        raise EOFError
    if not ready or os.WTERMSIG(status) == signal.SIGXCPU:
        return "time"
    return "crash"


def _read(verdict: Connection) -> bytes | None:
    """The fork's reply; None if it died before."""
    try:
        return verdict.recv_bytes()
    except EOFError:
        return None


def _answer(request: dict[str, Any], memory_mb: int, write_end: Connection, worker: int) -> None:
    """The work of a fork. Never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            return  # The worker died before the line above.
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        _limit(request["cpu_s"], memory_mb)
        verdict: bool | str = equal(request["reference"], request["answer"])
        # math-verify reports any exception as "not equal", also a lack of memory.
        if _peak_mb() > memory_mb / 2:
            verdict = "memory"
        write_end.send_bytes(json.dumps(verdict).encode())
    finally:
        os._exit(0)


def _limit(cpu_s: int, memory_mb: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_mb() -> float:
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmPeak"))
    return int(peak.split()[1]) / 1024


if __name__ == "__main__":
    main()
