"""What a response is worth: the built-in `match`, or a function that the user brings along."""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path

from kimi_core.config import RewardConfig
from kimi_core.plugins import load_function
from kimi_core.types import Prompt

log = logging.getLogger(__name__)

RewardFunction = Callable[[Prompt, str], float]
"""Called with the prompt and the text of the response, without the token that ended it.

One that holds processes or connections starts them at its first call and has a ``close()``, which
the end of the run calls.
"""


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a finite number.

    A fault of the function is never scored as a wrong answer: the policy would learn from it.
    """


class InfrastructureError(RuntimeError):
    """A verdict could not be reached, for a reason that is not the response's.

    A time-out of the checker, a sandbox that did not start, a judge whose verdict cannot be read.
    Raised after the retries that make sense. Nothing is known of the response, so it is never
    scored as wrong.
    """


class RewardOutage(RuntimeError):
    """Most verdicts could not be reached: whatever judges is out of order, so the run stops."""


def load_reward(config: RewardConfig, *, base_folder: str | Path = ".") -> RewardFunction:
    """The function that ``config.function`` names.

    Raises:
        ValueError: an unknown name, a ``file.py:function`` that cannot be loaded, or `code` where
            programs cannot be run safely.
    """
    if config.function == "match":
        return match
    if config.function == "math":
        from kimi_core.reward.math.reward import MathReward  # It imports this module.

        return MathReward(config.math)
    if config.function == "code":
        from kimi_core.reward.code.reward import code_reward  # It imports this module.

        return code_reward(config.sandbox)
    if ".py:" in config.function:
        return load_function(config.function, base_folder)
    raise ValueError(
        f"reward.function = {config.function!r}; allowed are match, math, code and file.py:function"
    )


def match(prompt: Prompt, response: str) -> float:
    """1 if the text after the last ``#``, or the whole response without one, is the answer.

    >>> match(Prompt(7, "3*214=", "642"), "3*14=42;3*200=600#642")
    1.0
    """
    return float(response.rpartition("#")[2].strip() == prompt.answer.strip())


def score(function: RewardFunction, prompt: Prompt, response: str) -> float:
    """Call a reward function and check what it returns; True counts as 1, False as 0.

    Raises:
        RewardError: it raised (the cause is chained), or returned no finite number.
        InfrastructureError: it raised one.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        value = function(prompt, response)
    except InfrastructureError:
        raise
    except Exception as error:  # the user's code, so it may raise anything
        raise RewardError(
            f"Reward function {name} raised {type(error).__name__} on prompt {prompt.id} "
            f"(response {response!r:.80}): {error}"
        ) from error
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardError(
            f"Reward function {name} returned {value!r} for prompt {prompt.id}; allowed is a "
            "finite int or float"
        )
    return float(value)


def judge_all(
    function: RewardFunction,
    responses: Sequence[tuple[Prompt, str]],
    *,
    workers: int,
    outage_from: int,
) -> list[float | None]:
    """Score responses on so many threads; None where no verdict could be reached.

    The results are in the order of ``responses``. With one worker, ``function`` is called in this
    thread.

    Args:
        outage_from: fewer failures than this are never an outage, so that a single response that
            nobody can judge does not stop a run.

    Raises:
        RewardError: as `score` does; of several, the one of the first response.
        RewardOutage: more than half of the verdicts, and at least ``outage_from``, failed.
    """

    def verdict(response: tuple[Prompt, str]) -> float | InfrastructureError:
        try:
            return score(function, *response)
        except InfrastructureError as error:
            log.warning("No verdict on a response to prompt %d: %s", response[0].id, error)
            return error

    if workers == 1:
        verdicts = [verdict(response) for response in responses]
    else:
        with ThreadPoolExecutor(workers, thread_name_prefix="reward") as threads:
            verdicts = list(threads.map(verdict, responses))
    failures = [one for one in verdicts if isinstance(one, InfrastructureError)]
    if len(failures) >= outage_from and 2 * len(failures) > len(verdicts):
        raise RewardOutage(
            f"{len(failures)} of {len(verdicts)} verdicts could not be reached, the last because: "
            f"{failures[-1]}. Mend what judges and start again; a run goes on with --resume and "
            "judges these responses anew"
        ) from failures[-1]
    return [None if isinstance(one, InfrastructureError) else one for one in verdicts]


def close_reward(function: RewardFunction) -> None:
    """End what the function holds, if it has a ``close()``."""
    close = getattr(function, "close", None)
    if close is not None:
        close()
