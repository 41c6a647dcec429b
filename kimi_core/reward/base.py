"""What a reward function is, and the three ways in which it can fail."""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from kimi_core.types import Prompt, Score

RewardFunction = Callable[[Prompt, str], Any]
"""Called with the prompt and the response's text, without the token that ended the response. It
returns a number or a ``Score``, and may be ``async``. A function whose first parameter is called
``prompts`` is called with lists of both and returns a list.

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


def score(function: RewardFunction, prompt: Prompt, response: str) -> Score:
    """Call a reward function and check what it returns; True counts as 1, False as 0.

    Raises:
        RewardError: the function raised (the cause is chained), or returned no finite number.
        InfrastructureError: the function raised it.
    """
    with named_errors(function, prompt, response):
        value = function(prompt, response)
    return checked(function, value, prompt)


@contextmanager
def named_errors(function: RewardFunction, prompt: Prompt, response: str) -> Iterator[None]:
    """Turn whatever the user's code raises, but InfrastructureError, into a RewardError."""
    try:
        yield
    except InfrastructureError:
        raise
    except Exception as error:
        raise RewardError(
            f"Reward function {name_of(function)} raised {type(error).__name__} on prompt "
            f"{prompt.id} (response {response!r:.80}): {error}{place_of(error)}"
        ) from error


def place_of(error: BaseException) -> str:
    """Where an error was raised, in brackets: the file's name and the line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def checked(function: RewardFunction, value: Any, prompt: Prompt) -> Score:
    """The score that a function returned.

    Raises:
        RewardError: it is no finite number, nor a Score of finite numbers.
    """
    found = value if isinstance(value, Score) else Score(value)
    if not all(map(_is_finite, (found.value, *found.parts.values()))):
        raise RewardError(
            f"Reward function {name_of(function)} returned {value!r} for prompt {prompt.id}; "
            "allowed is a finite int or float, or a Score of these"
        )
    parts = {name: float(part) for name, part in found.parts.items()}
    return Score(float(found.value), parts, found.note)


def name_of(function: RewardFunction) -> str:
    return getattr(function, "__name__", repr(function))


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
