"""What a response is worth: the built-in `match`, or a function that the user brings along."""

import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path

from kimi_core.config import RewardConfig
from kimi_core.plugins import load_function
from kimi_core.types import Prompt

RewardFunction = Callable[[Prompt, str], float]
"""Called with the prompt and the text of the response, without the token that ended it."""


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


def load_reward(config: RewardConfig, *, base_folder: str | Path = ".") -> RewardFunction:
    """The function that ``config.function`` names.

    Raises:
        ValueError: an unknown name, a ``file.py:function`` that cannot be loaded, or `code` where
            programs cannot be run safely.
    """
    if config.function == "match":
        return match
    if config.function == "code":
        # Here, as no other run needs a sandbox.
        from kimi_core.reward.code import code_reward

        return code_reward(config.sandbox)
    if ".py:" in config.function:
        return load_function(config.function, base_folder)
    raise ValueError(
        f"reward.function = {config.function!r}; allowed are match, code and file.py:function"
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
