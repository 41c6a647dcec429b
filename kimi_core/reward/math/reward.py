"""The reward of `reward.function = "math"`: is the final answer the reference, in whatever form?

Plain answers are compared on the spot (`answers.agree`). The rest goes to math-verify in worker
processes (`math_worker`), as an answer may be anything: a tower of powers, ten thousand braces. A
verdict has a limit of CPU time, so that a busy machine changes none, and one of memory; without a
verdict it is tried once more, from a clean slate, and then raises `InfrastructureError`.
"""

import json
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from multiprocessing.connection import Connection

from kimi_core.config import MathConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.math.answers import agree, clean, extract
from kimi_core.types import Prompt

START_S = 120.0
"""A worker imports sympy before it serves: a CPU-second, on a crowded machine much more by the
clock."""

WALL_S_PER_CPU_S = 10.0
"""A request gets its CPU time even if it has a tenth of a core, then it is given up."""

END_S = 10.0
"""What a worker may take to end; then it is killed."""

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
    """1 for a final answer that is equivalent to the prompt's, else 0; thread-safe.

    As many worker processes as threads that call it at once, each started when it is first needed.
    A response without an answer, or with one that cannot be read, is wrong.
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
        """Raises InfrastructureError: neither of two attempts came to a verdict."""
        answer = extract(response, self._config.extraction)
        if answer is None:
            return 0.0
        reference = extract(prompt.answer, ["boxed", "hashes"]) or prompt.answer
        return float(self.equal(reference, answer))

    def equal(self, reference: str, answer: str) -> bool:
        """Whether two final answers are equivalent; raises InfrastructureError as a call does."""
        reference, answer = clean(reference), clean(answer)
        verdict = agree(reference, answer)
        if verdict is not None:
            return verdict
        for _ in range(ATTEMPTS):
            said = self._ask(reference, answer)
            if isinstance(said, bool):
                return said
        reason = REASONS[str(said)].format(cpu_s=self._config.cpu_s, memory_mb=MEMORY_MB)
        raise InfrastructureError(
            f"Comparing the answer {answer!r:.80} to {reference!r:.80} {reason}, "
            f"{ATTEMPTS} times running"
        )

    def close(self) -> None:
        """End the workers; another call starts new ones."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.close()

    def _ask(self, reference: str, answer: str) -> bool | str:
        """The verdict, or a key of REASONS; a worker that did not answer is replaced."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker()
        try:
            said = worker.ask(reference, answer, self._config.cpu_s)
        except _Silent:
            worker.close()
            return "no answer"
        except BaseException:  # Ctrl-C: its answer would be taken for that to the next question.
            worker.close()
            raise
        with self._lock:
            self._idle.append(worker)
        return said


class _Silent(RuntimeError):
    """A worker has died, or not answered in time."""


class _Worker:
    """A ``math_worker`` process; one question at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: in the repository's root, -m would import the folder there, uncompiled.
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(MEMORY_MB)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us: what is being judged is finished.
            )
        self._connection = Connection(ours.detach())
        self._is_ready = False

    def ask(self, reference: str, answer: str, cpu_s: int) -> bool | str:
        """Raises _Silent."""
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
        """End the process; it ends the fork that it may have before itself."""
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
