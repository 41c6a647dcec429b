"""Verdicts on many responses at once."""

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kimi_core.reward.base import (
    InfrastructureError,
    LimitReached,
    RewardError,
    RewardFunction,
    RewardOutage,
    checked,
    name_of,
    named_errors,
    score,
)
from kimi_core.reward.combined import CombinedReward, Reward
from kimi_core.reward.threads import call_all
from kimi_core.types import Prompt, Score

log = logging.getLogger(__name__)

Response = tuple[Prompt, str]
Verdict = Score | InfrastructureError


def judge_all(
    function: Reward,
    responses: Sequence[Response],
    *,
    workers: int,
    outage_from: int,
    timeout_s: float = math.inf,
) -> list[Score | None]:
    """Score responses, in order; None stands for a verdict that could not be reached.

    Args:
        workers: threads that call ``function``, or calls of an ``async`` one at the same time.
        timeout_s: seconds that a call may take; after that its response has no verdict.
        outage_from: fewer failures than this are never an outage, so that a single response that
            nobody can judge does not stop a run.

    Raises:
        RewardError: as `score` raises it; if several do, that of the first response.
        RewardOutage: more than half of the verdicts, and at least ``outage_from``, failed for a
            reason other than a limit that the response reached.
    """
    verdicts = verdicts_on(function, responses, workers, timeout_s)
    for (prompt, _), one in zip(responses, verdicts, strict=True):
        if isinstance(one, InfrastructureError):
            log.warning("No verdict on a response to prompt %d: %s", prompt.id, one)
    missing = [one for one in verdicts if isinstance(one, InfrastructureError)]
    failures = [one for one in missing if not isinstance(one, LimitReached)]
    if len(failures) >= outage_from and 2 * len(failures) > len(verdicts):
        raise RewardOutage(
            f"{len(failures)} of {len(verdicts)} verdicts could not be reached, the last because: "
            f"{failures[-1]}. Repair the checker and start again: --resume continues the run and "
            "judges these responses a second time"
        ) from failures[-1]
    return [None if isinstance(one, InfrastructureError) else one for one in verdicts]


def verdicts_on(
    function: Reward, responses: Sequence[Response], workers: int, timeout_s: float = math.inf
) -> list[Verdict]:
    """A score, or the reason why there is none, for each response. Raises RewardError."""
    if not responses:
        return []
    if isinstance(function, CombinedReward):
        columns = [
            verdicts_on(part.function, responses, workers, timeout_s) for part in function.parts
        ]
        return [function.combine(row) for row in zip(*columns, strict=True)]
    if _takes_batch(function):
        return _batch(function, responses, timeout_s)
    if _is_async(function):
        return asyncio.run(_together(function, responses, workers, timeout_s))

    def verdict(response: Response) -> Verdict:
        try:
            return score(function, *response)
        except InfrastructureError as error:
            return error

    what = f"the reward function {name_of(function)}"
    return call_all(verdict, responses, workers=workers, timeout_s=timeout_s, what=what)


async def _together(
    function: Callable[[Prompt, str], Awaitable[Any]],
    responses: Sequence[Response],
    workers: int,
    timeout_s: float,
) -> list[Verdict]:
    """Await all calls, ``workers`` at the same time."""
    free = asyncio.Semaphore(workers)

    async def verdict(prompt: Prompt, text: str) -> Verdict:
        async with free:
            try:
                with named_errors(function, prompt, text):
                    async with asyncio.timeout(None if timeout_s == math.inf else timeout_s):
                        value = await function(prompt, text)
                return checked(function, value, prompt)
            except InfrastructureError as error:
                return error
            except RewardError as error:
                if isinstance(error.__cause__, TimeoutError):
                    return InfrastructureError(str(error))
                raise

    return list(await asyncio.gather(*(verdict(*response) for response in responses)))


def _batch(
    function: RewardFunction, responses: Sequence[Response], timeout_s: float
) -> list[Verdict]:
    """One call for all. An entry of None is a response without a verdict."""
    prompts, texts = [prompt for prompt, _ in responses], [text for _, text in responses]

    def call(_: None) -> list[Any] | InfrastructureError:
        try:
            with named_errors(function, prompts[0], texts[0]):
                value: Any = function(prompts, texts)  # type: ignore[arg-type]
                return list(asyncio.run(_value_of(value)) if inspect.isawaitable(value) else value)
        except InfrastructureError as error:
            return error

    what = f"the reward function {name_of(function)}"
    (found,) = call_all(call, [None], workers=1, timeout_s=timeout_s, what=what)
    if isinstance(found, InfrastructureError):
        return [found] * len(responses)
    if len(found) != len(responses):
        raise RewardError(
            f"Reward function {name_of(function)} returned {len(found)} results for "
            f"{len(responses)} responses; return one each, None where there is no verdict"
        )
    none = InfrastructureError(f"{name_of(function)} returned None")
    return [
        none if value is None else checked(function, value, prompt)
        for value, prompt in zip(found, prompts, strict=True)
    ]


async def _value_of(found: Awaitable[Any]) -> Any:
    return await found


def _takes_batch(function: RewardFunction) -> bool:
    try:
        return next(iter(inspect.signature(function).parameters), "") == "prompts"
    except (ValueError, TypeError):  # Builtins have no signature.
        return False


def _is_async(function: RewardFunction) -> bool:
    called = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(called)
