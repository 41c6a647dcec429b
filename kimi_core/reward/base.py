"""What a reward function is, and the three ways in which it can fail."""

import math
from collections.abc import Callable
from numbers import Real

from kimi_core.types import Prompt

RewardFunction = Callable[[Prompt, str], float]
"""Called with the prompt and the response's text, without the token that ended the response.

A function that holds processes or connections starts them at its first call and has a ``close()``,
which is called at the end of the run.
"""


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a finite number.

    A fault of the function never counts as a wrong answer, because the policy would learn from it.
    """


class InfrastructureError(RuntimeError):
    """A verdict could not be reached, for a reason that does not lie in the response.

    For example the checker ran out of time, a sandbox did not start, or a judge's verdict cannot be
    read. Raised after all sensible retries. Nothing is known of the response, so it never counts as
    wrong.
    """


class LimitReached(InfrastructureError):
    """A response used up the checker's time or memory. It has no verdict, and cannot stop a run."""


class RewardOutage(RuntimeError):
    """Most verdicts could not be reached: the checker is out of order, so the run stops."""


def score(function: RewardFunction, prompt: Prompt, response: str) -> float:
    """Call a reward function and check what it returns; True counts as 1, False as 0.

    Raises:
        RewardError: the function raised (the cause is chained), or returned no finite number.
        InfrastructureError: the function raised it.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        value = function(prompt, response)
    except InfrastructureError:
        raise
    except Exception as error:  # The user's code may raise anything.
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
