"""A user's reward function, which runs in processes apart from the run.

It reads text that a model wrote, and may hang on it in a call that no thread can interrupt: a
regular expression is enough. A process can be ended.
"""

import json
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_core.reward.base import InfrastructureError, LimitReached, RewardError
from kimi_core.reward.calls import Response, Verdict, Way
from kimi_core.reward.workers import Silent, Workers
from kimi_core.types import Prompt, Score

WORKER = "kimi_core.reward.user_worker"

GRACE_S = 5.0
"""After an ``async`` call has used up its time, its process has this long to say so."""


class UserFunction:
    """The function of a ``file.py:function``; thread-safe.

    There are as many processes as threads that call it at the same time. Each imports the file.
    """

    def __init__(self, spec: str, base_folder: str | Path = ".", *, start_s: float) -> None:
        """Import the file in a first process, for at most ``start_s``: it may load a model.

        Raises:
            ValueError: the file, or the function in it, cannot be loaded.
        """
        self.__name__ = spec.rpartition(":")[2]
        arguments = [spec, str(Path(base_folder).resolve()), json.dumps(sys.path)]
        self._workers = Workers(WORKER, arguments, start_s=start_s)
        try:
            greeting = self._workers.greeting()
        except Silent as error:
            raise ValueError(f"{spec}: importing the file {error}") from None
        if "error" in greeting:
            self.close()
            raise ValueError(greeting["error"])
        self.way: Way = greeting["way"]

    def verdicts(
        self, responses: Sequence[Response], workers: int, timeout_s: float
    ) -> list[Verdict]:
        """Verdicts from one process. If it dies or is late, each response is asked alone.

        Args:
            workers: calls of an ``async`` function at the same time.
            timeout_s: seconds that a call may take.

        Raises:
            RewardError: the function raised, or returned something else than a number or a Score.
        """
        rounds = -(-len(responses) // workers) if self.way == "async" else 1
        grace_s = GRACE_S if self.way == "async" else 0.0
        try:
            message = pickle.dumps((list(responses), workers, timeout_s))
        except Exception as error:
            raise RewardError(
                f"A prompt cannot be sent to the process of {self.__name__} ({error}): keep plain "
                "values in its tags"
            ) from error
        try:
            reply = self._workers.ask(message, rounds * timeout_s + grace_s)
        except Silent as silent:
            if len(responses) > 1:
                alone = (self.verdicts([one], workers, timeout_s) for one in responses)
                return [verdict for (verdict,) in alone]
            (prompt, text), *_ = responses
            said = f"the reward function {self.__name__} {silent}"
            return [InfrastructureError(f"{said} on prompt {prompt.id} (response {text!r:.80})")]
        if isinstance(reply, dict):
            raise RewardError(reply["error"])
        return [_verdict_in(one) for one in reply]

    def __call__(self, prompt: Prompt, response: str) -> Score:
        """The verdict on one response, without a deadline.

        Raises:
            RewardError: as ``verdicts``.
            InfrastructureError: there is no verdict.
        """
        (verdict,) = self.verdicts([(prompt, response)], 1, math.inf)
        if isinstance(verdict, InfrastructureError):
            raise verdict
        return verdict

    def close(self) -> None:
        """End the processes; the function's own ``close()`` is called in each."""
        self._workers.close()


def _verdict_in(reply: list[Any]) -> Verdict:
    """Read what ``user_worker`` wrote."""
    kind, *rest = reply
    if kind == "score":
        return Score(*rest)
    return (LimitReached if kind == "limit" else InfrastructureError)(*rest)
