"""The reward of `reward.function = "math"`: is the final answer the reference, in any form?

Plain answers are compared at once (`answers.agree`). The rest goes to math-verify in worker
processes (`worker`), because an answer may be anything: a tower of powers, ten thousand braces. A
comparison has a limit of CPU time, so that a busy machine changes no verdict, and a limit of
memory. Without a verdict it is tried once more in a fresh process, and then raises
`InfrastructureError`.
"""

import json
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from multiprocessing.connection import Connection

from kimi_core.config import MathConfig
from kimi_core.reward.base import InfrastructureError, LimitReached
from kimi_core.reward.math.answers import agree, clean, is_restated
from kimi_core.reward.math.extract import extract
from kimi_core.types import Prompt

START_S = 120.0
"""Seconds that a worker may take to start. It imports sympy, which takes one CPU second, and much
more by the clock on a busy machine."""

WALL_S_PER_CPU_S = 10.0
"""A request gets its CPU time even with a tenth of a core. After that it is given up."""

END_S = 10.0
"""Seconds that a worker may take to end; then it is killed."""

MEMORY_MB = 1024
"""Address space of a comparison. One that uses more than half of it gets no verdict."""

ATTEMPTS = 2

WORKER = "kimi_core.reward.math.worker"

REASONS = {
    "time": "took more than {cpu_s} CPU-seconds",
    "memory": "came near the limit of {memory_mb} MB",
    "crash": "killed its process",
    "no answer": "was not answered by its worker",
}


class MathReward:
    """1 if the final answer is equivalent to the prompt's, otherwise 0; thread-safe.

    There are as many worker processes as threads that call it at the same time. Each starts when it
    is first needed. A response without an answer, or with an unreadable one, is wrong.
    """

    __name__ = "math"

    def __init__(self, config: MathConfig) -> None:
        """Raises ValueError if math-verify is not installed."""
        if find_spec("math_verify") is None:
            raise ValueError(
                "reward.function = 'math' needs math-verify: pip install 'kimi-core[math]'"
            )
        self._config = config
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Judge a response.

        Raises:
            LimitReached: both attempts ran into the limit of time or memory.
            InfrastructureError: a worker died in both attempts.
        """
        answer = extract(response, self._config.extraction)
        if answer is None:
            return 0.0
        reference = extract(prompt.answer, ["boxed", "hashes", "answer"]) or prompt.answer
        return float(self.equal(reference, answer))

    def equal(self, reference: str, answer: str) -> bool:
        """Whether two final answers are equivalent. Raises as ``__call__``."""
        reference, answer = clean(reference), clean(answer)
        verdict = agree(reference, answer)
        if verdict is not None:
            return verdict
        if not self._config.unevaluated and is_restated(reference, answer):
            return False
        for _ in range(ATTEMPTS):
            said = self._ask(reference, answer)
            if isinstance(said, bool):
                return said
        reason = REASONS[str(said)].format(cpu_s=self._config.cpu_s, memory_mb=MEMORY_MB)
        kind = LimitReached if said in ("time", "memory") else InfrastructureError
        raise kind(
            f"Comparing the answer {answer!r:.80} to {reference!r:.80} {reason}, "
            f"in {ATTEMPTS} attempts"
        )

    def close(self) -> None:
        """End the workers; another call starts new ones."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.close()

    def _ask(self, reference: str, answer: str) -> bool | str:
        """The verdict, or a key of REASONS. A worker that did not answer is replaced."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker()
        try:
            said = worker.ask(reference, answer, self._config.cpu_s)
        except _Silent:
            worker.close()
            return "no answer"
        except BaseException:  # Ctrl-C: the answer would otherwise go to the next question.
            worker.close()
            raise
        with self._lock:
            self._idle.append(worker)
        return said


class _Silent(RuntimeError):
    """A worker has died, or not answered in time."""


class _Worker:
    """A worker process; it answers one question at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: in the repository's root, -m would import the uncompiled folder there.
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(MEMORY_MB)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for us; the comparison finishes.
            )
        self._connection = Connection(ours.detach())
        self._is_ready = False

    def ask(self, reference: str, answer: str, cpu_s: int) -> bool | str:
        """The worker's answer. Raises _Silent."""
        wall_s = WALL_S_PER_CPU_S * cpu_s
        request = {"reference": reference, "answer": answer, "cpu_s": cpu_s, "wall_s": wall_s}
        try:
            if not self._is_ready:
                self._receive(START_S)
                self._is_ready = True
            self._connection.send_bytes(json.dumps(request).encode())
            return self._receive(wall_s + START_S)
        except (EOFError, OSError) as error:
            raise _Silent from error

    def close(self) -> None:
        """End the process, which first ends its fork."""
        self._connection.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, deadline_s: float) -> bool | str:
        if not self._connection.poll(deadline_s):
            raise _Silent
        said: bool | str = json.loads(self._connection.recv_bytes())
        return said
