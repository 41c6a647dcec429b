"""Checks a file of programming problems and their reference solutions before a run; `kimi check`.

A problem is sound if its reference solution (``answer``) passes all its tests and an empty program
does not. Problems without a reference solution are only read.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code.problem import problem_of
from kimi_core.reward.code.reward import CodeReward
from kimi_core.types import Prompt

OUTCOMES = ("sound", "no reference", "malformed", "reference fails", "empty passes", "no verdict")


def check_problems(
    prompts: Sequence[Prompt], reward: CodeReward, *, workers: int, say: Callable[[str], None]
) -> dict[str, int]:
    """Check every problem; report each that is not sound, in order, and return the counts.

    Args:
        say: takes one line of JSON for each problem that cannot be trained on.
    """
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(lambda prompt: _outcome(prompt, reward), prompts)
        counts: Counter[str] = Counter()
        for prompt, (outcome, detail) in zip(prompts, outcomes, strict=True):
            counts[outcome] += 1
            if outcome not in OUTCOMES[:2]:
                say(json.dumps({"prompt": prompt.id, "outcome": outcome, "detail": detail}))
    return {name: counts[name] for name in OUTCOMES}


def _outcome(prompt: Prompt, reward: CodeReward) -> tuple[str, str]:
    try:
        problem_of(prompt)
        if not prompt.answer:
            return "no reference", ""
        verdict = reward.judge(prompt, prompt.answer)
        if not verdict.passed:
            return "reference fails", f"test {verdict.test}: {verdict.status}, {verdict.detail}"
        if reward.judge(prompt, "").passed:
            return "empty passes", "an empty program passes all tests"
        return "sound", ""
    except ValueError as error:
        return "malformed", str(error)
    except InfrastructureError as error:
        return "no verdict", str(error)
