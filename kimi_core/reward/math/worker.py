"""The process in which math-verify compares answers: ``python -m … SOCKET_FD MEMORY_MB``.

It says ``"ready"`` once everything is imported. Then each message is ``{"reference": …,
"answer": …, "cpu_s": …, "wall_s": …}``, answered by ``true``, ``false``, or the reason why there is
no verdict: ``"time"``, ``"memory"`` or ``"crash"``. It ends when the connection does.

Each request is worked on by a fork of this process, which costs milliseconds as everything is
loaded already. Whatever an answer does, it does to that fork: this process parses none, so it
cannot hang or die of one, and the next request, or a second try, finds everything new. Nothing is
evaluated as Python: of math-verify only the LaTeX parser is used.
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
"""What the parser learns of its grammar while it reads these, every fork has for nothing."""


def main() -> None:
    """Serve until the connection ends."""
    connection, memory_mb = Connection(int(sys.argv[1])), int(sys.argv[2])
    logging.disable(logging.CRITICAL)  # math-verify warns that the time limit is ours to keep.
    for reference, answer in WARM_UP:
        equal(reference, answer)
    gc.freeze()  # Pages that nobody writes to are not copied.
    connection.send_bytes(b'"ready"')
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_in_a_fork(request, memory_mb, connection)).encode())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify takes ``answer`` for ``reference``; both cleaned.

    It reads i as a variable, so that (1+i)² would not be 2i: here it is the imaginary unit.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, MatrixBase

    def read(text: str) -> list[Any]:
        whole = [LatexExtractionConfig(boxed_match_priority=-1)]
        # With a dollar within, it would be several formulas, of which the last one counts.
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
        EOFError: the other side has gone meanwhile.
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
    """What the fork said; None if it died before."""
    try:
        return verdict.recv_bytes()
    except EOFError:
        return None


def _answer(request: dict[str, Any], memory_mb: int, write_end: Connection, worker: int) -> None:
    """What a fork does; it never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            return  # The worker died before the line above.
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        _limit(request["cpu_s"], memory_mb)
        verdict: bool | str = equal(request["reference"], request["answer"])
        # math-verify takes any exception for "not equal", one for want of memory included.
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
