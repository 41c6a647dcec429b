"""The reward of `reward.function = "math"`: is the final answer the reference, in any form?

Plain answers are compared at once (`answers.agree`). The rest goes to math-verify in worker
processes (`worker`), because an answer may be anything: a tower of powers, ten thousand braces. A
comparison has a limit of CPU time, so that a busy machine changes no verdict, and a limit of
memory. Without a verdict it is tried once more in a fresh process, and then raises
`InfrastructureError`.
"""

import json
from importlib.util import find_spec

from kimi_core.config import MathConfig
from kimi_core.reward.base import InfrastructureError, LimitReached
from kimi_core.reward.math.answers import agree, clean, is_restated
from kimi_core.reward.math.extract import extract
from kimi_core.reward.workers import START_S, Silent, Workers
from kimi_core.types import Prompt

WALL_S_PER_CPU_S = 10.0
"""A request gets its CPU time even with a tenth of a core. After that it is given up."""

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
        self._workers = Workers(WORKER, [str(MEMORY_MB)])

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
        self._workers.close()

    def _ask(self, reference: str, answer: str) -> bool | str:
        """The verdict, or a key of REASONS."""
        cpu_s = self._config.cpu_s
        wall_s = WALL_S_PER_CPU_S * cpu_s
        request = {"reference": reference, "answer": answer, "cpu_s": cpu_s, "wall_s": wall_s}
        try:
            said: bool | str = self._workers.ask(json.dumps(request).encode(), wall_s + START_S)
        except Silent:
            return "no answer"
        return said
