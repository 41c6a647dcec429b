"""From names to reward functions."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kimi_core.config import RewardConfig
from kimi_core.plugins import load_function
from kimi_core.reward.base import InfrastructureError, RewardFunction, score
from kimi_core.reward.code.problem import problem_of
from kimi_core.reward.code.reward import CodeReward, code_reward
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt


def load_reward(config: RewardConfig, *, base_folder: str | Path = ".") -> RewardFunction:
    """The function that ``config.function`` names.

    Raises:
        ValueError: the name is unknown, a ``file.py:function`` cannot be loaded, or programs cannot
            be run safely here.
    """
    if config.function == "match":
        return match
    if config.function == "math":
        return MathReward(config.math)
    if config.function == "code":
        return code_reward(config.sandbox)
    if ".py:" in config.function:
        return load_function(config.function, base_folder)
    raise ValueError(
        f"reward.function = {config.function!r}; allowed are match, math, code and file.py:function"
    )


def try_reward(function: RewardFunction, prompts: Sequence[Prompt]) -> None:
    """Read the tests of all prompts and judge an empty response to the first, before a run.

    So a broken problem, a wrong signature or a package that is missing costs no training.

    Raises:
        ValueError: a prompt's tests are malformed.
        RewardError: the function raised, or returned something else than a finite number.
    """
    if isinstance(function, CodeReward):
        for prompt in prompts:
            problem_of(prompt)
    with suppress(InfrastructureError):  # A judge that is away now may be back later.
        score(function, prompts[0], "")


def match(prompt: Prompt, response: str) -> float:
    """1 if the text after the last ``#`` is the answer; without a ``#`` the whole response.

    >>> match(Prompt(7, "3*214=", "642"), "3*14=42;3*200=600#642")
    1.0
    """
    return float(response.rpartition("#")[2].strip() == prompt.answer.strip())


def close_reward(function: RewardFunction) -> None:
    """Call the function's ``close()``, if it has one."""
    close = getattr(function, "close", None)
    if close is not None:
        close()
