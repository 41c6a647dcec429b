"""The three ways to call a reward function: once a response, ``async``, or once for all."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from kimi_core.reward.base import (
    InfrastructureError,
    RewardError,
    RewardFunction,
    checked,
    name_of,
    named_errors,
    score,
)
from kimi_core.types import Prompt, Score

Response = tuple[Prompt, str]
Verdict = Score | InfrastructureError
Way = Literal["one", "async", "batch"]


def way_of(function: RewardFunction) -> Way:
    """How a function wants to be called: its first parameter or its ``async`` tells."""
    try:
        first = next(iter(inspect.signature(function).parameters), "")
    except (ValueError, TypeError):  # Builtins have no signature.
        first = ""
    if first == "prompts":
        return "batch"
    called = function if inspect.isroutine(function) else type(function).__call__
    return "async" if inspect.iscoroutinefunction(called) else "one"


def call_one(function: RewardFunction, response: Response) -> Verdict:
    """The verdict of one call. Raises RewardError."""
    try:
        return score(function, *response)
    except InfrastructureError as error:
        return error


def call_async(
    function: RewardFunction, responses: Sequence[Response], workers: int, timeout_s: float
) -> list[Verdict]:
    """Await all calls, ``workers`` at the same time, each for ``timeout_s``. Raises RewardError."""
    return _run(_together(function, responses, workers, timeout_s))


def _run(awaited: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, also where this thread runs an event loop, as a notebook does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # There is none.
        return asyncio.run(awaited)
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, awaited).result()


async def _together(
    function: Callable[[Prompt, str], Awaitable[Any]],
    responses: Sequence[Response],
    workers: int,
    timeout_s: float,
) -> list[Verdict]:
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


def call_batch(function: RewardFunction, responses: Sequence[Response]) -> list[Verdict]:
    """One call for all. An entry of None is a response without a verdict. Raises RewardError."""
    prompts, texts = [prompt for prompt, _ in responses], [text for _, text in responses]
    try:
        with named_errors(function, prompts[0], texts[0]):
            value: Any = function(prompts, texts)  # type: ignore[arg-type]
            found = list(_run(_value_of(value)) if inspect.isawaitable(value) else value)
    except InfrastructureError as error:
        return [error] * len(responses)
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
