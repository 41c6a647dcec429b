"""From names to reward functions."""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from kimi_core.config import RewardConfig
from kimi_core.reward.base import InfrastructureError, RewardFunction
from kimi_core.reward.code.problem import check_sources
from kimi_core.reward.code.reward import CodeReward, code_reward
from kimi_core.reward.combined import CombinedReward, Part, Reward
from kimi_core.reward.judging import verdicts_on
from kimi_core.reward.math.reward import MathReward
from kimi_core.reward.user_function import UserFunction
from kimi_core.types import Prompt

log = logging.getLogger(__name__)


def load_reward(config: RewardConfig, *, base_folder: str | Path = ".") -> Reward:
    """The function that ``config.function`` names, or the sum of ``config.functions``.

    Raises:
        ValueError: a name is unknown or given twice, a ``file.py:function`` cannot be loaded,
            programs cannot be run safely here, or a judge has no address.
    """
    if not config.functions:
        return _load(config.function, config, base_folder)
    names = [one.name or one.function.rpartition(":")[2] for one in config.functions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"reward.functions: {', '.join(twice)} is there twice; give each its own `name`"
        )
    return CombinedReward(
        [
            Part(name, one.weight, _load(one.function, config, base_folder))
            for name, one in zip(names, config.functions, strict=True)
        ]
    )


def _load(name: str, config: RewardConfig, base_folder: str | Path) -> RewardFunction:
    if name == "match":
        return match
    if name == "math":
        return MathReward(config.math)
    if name == "code":
        return code_reward(config.sandbox)
    if name == "judge":
        try:
            from kimi_core.reward.judges.http import HttpJudge  # Nothing else needs httpx2.
        except ImportError as error:
            raise ValueError(f"{error}: pip install 'kimi-core[judge]'") from None
        return HttpJudge(config.judge)
    if name == "value":
        # A run without it loads no model for its rewards.
        from kimi_core.reward.judges.value_model import ValueReward

        return ValueReward(Path(config.value.model))
    if ".py:" in name:
        return UserFunction(name, base_folder, start_s=config.timeout_s)
    raise ValueError(
        f"reward.function = {name!r}; allowed are match, math, code, judge, value and "
        "file.py:function"
    )


def try_reward(function: Reward, *sets: Sequence[Prompt]) -> None:
    """Read the tests of all prompts and judge an empty response to the first, before a run.

    So a broken problem, a wrong signature or a package that is missing costs no training.

    Raises:
        ValueError: a prompt's tests are malformed.
        RewardError: the function raised, or returned something else than a finite number.
    """
    functions: list[Any] = [function]
    if isinstance(function, CombinedReward):
        functions = [part.function for part in function.parts]
    if any(isinstance(one, CodeReward) for one in functions):
        for prompt in chain.from_iterable(sets):
            check_sources(prompt)
    (found,) = verdicts_on(function, [(sets[0][0], "")], workers=1)
    if isinstance(found, InfrastructureError):  # A judge that is away now may be back later.
        log.warning("The reward function has no verdict on a trial response: %s", found)


def match(prompt: Prompt, response: str) -> float:
    """1 if the text after the last ``#`` is the answer; without a ``#`` the whole response.

    >>> match(Prompt(7, "3*214=", "642"), "3*14=42;3*200=600#642")
    1.0
    """
    return float(final(response) == prompt.answer.strip())


def final(response: str) -> str:
    """What ``match`` takes for the answer of a response.

    >>> final("3*14=42;3*200=600# 642")
    '642'
    """
    return response.rpartition("#")[2].strip()


def close_reward(function: Reward) -> None:
    """Call the function's ``close()``, if it has one."""
    close = getattr(function, "close", None)
    if close is not None:
        close()
