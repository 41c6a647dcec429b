"""Verdicts on many responses, which may begin while others are still sampled."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kimi_core.reward.base import (
    InfrastructureError,
    LimitReached,
    RewardFunction,
    RewardOutage,
    name_of,
)
from kimi_core.reward.calls import (
    Response,
    Verdict,
    Way,
    call_async,
    call_batch,
    call_one,
    way_of,
)
from kimi_core.reward.combined import CombinedReward, Reward
from kimi_core.reward.threads import Calls
from kimi_core.reward.user_function import UserFunction
from kimi_core.types import Score

log = logging.getLogger(__name__)


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
    return scores(responses, verdicts, outage_from)


def scores(
    responses: Sequence[Response], verdicts: Sequence[Verdict], outage_from: int
) -> list[Score | None]:
    """What ``judge_all`` returns, or raises, for these verdicts."""
    for (prompt, _), one in zip(responses, verdicts, strict=True):
        if isinstance(one, InfrastructureError):
            log.warning("No verdict on a response to prompt %d: %s", prompt.id, one)
    missing = [one for one in verdicts if isinstance(one, InfrastructureError)]
    failures = [one for one in missing if not isinstance(one, LimitReached)]
    if len(failures) >= outage_from and 2 * len(failures) > len(verdicts):
        raise RewardOutage(
            f"{len(failures)} of {len(verdicts)} verdicts could not be reached, the last because: "
            f"{failures[-1]}. Repair the checker and start again: --resume continues the run and "
            "judges these responses a second time (with --accept-changes if its file has changed)"
        ) from failures[-1]
    return [None if isinstance(one, InfrastructureError) else one for one in verdicts]


def verdicts_on(
    function: Reward, responses: Sequence[Response], workers: int, timeout_s: float = math.inf
) -> list[Verdict]:
    """A score, or the reason why there is none, for each response. Raises RewardError."""
    judging = Judging(function, workers, timeout_s)
    for key, response in enumerate(responses):
        judging.add(key, response)
    return judging.verdicts(range(len(responses)))


class Judging:
    """Verdicts on responses that come one by one.

    A function of one response is called when the response is added, in one of ``workers`` threads.
    One that is ``async`` or that takes all responses at once gets them together, at the end.

    Args: as for ``judge_all``.
    """

    def __init__(
        self,
        function: Reward,
        workers: int,
        timeout_s: float = math.inf,
        calls: Calls | None = None,
    ) -> None:
        self._function = function
        self._workers, self._timeout_s = workers, timeout_s
        self._calls = calls or Calls(workers)
        """The threads, which the parts of a combined reward share."""
        self._parts: list[Judging] = []
        if isinstance(function, CombinedReward):
            self._parts = [
                Judging(part.function, workers, timeout_s, self._calls) for part in function.parts
            ]
        self._responses: dict[int, Response] = {}
        self._places: dict[int, int] = {}
        """Key → place in the results of the calls."""

    def add(self, key: int, response: Response) -> None:
        """Judge a response, which ``key`` names."""
        self._responses[key] = response
        for part in self._parts:
            part.add(key, response)
        function = self._function
        if isinstance(function, CombinedReward) or _way(function) != "one":
            return
        ask, timeout_s = partial(call_one, function), self._timeout_s
        if isinstance(function, UserFunction):
            # The processes keep the time, so that none is left behind that still runs.
            ask, timeout_s = partial(_one_of_user, function, timeout_s), math.inf
        what = _what(function)
        self._places[key] = self._calls.add(ask, response, timeout_s=timeout_s, what=what)

    def verdicts(self, keys: Iterable[int]) -> list[Verdict]:
        """The verdicts on these responses, in this order whatever order they came in.

        Raises:
            RewardError: as ``score`` raises it; if several do, that of the first response.
        """
        keys = list(keys)
        if isinstance(self._function, CombinedReward):
            columns = [part.verdicts(keys) for part in self._parts]
            return [self._function.combine(row) for row in zip(*columns, strict=True)]
        if not self._places:
            return self._together(self._function, [self._responses[key] for key in keys])
        results = self._calls.results()
        return _raised(results[self._places[key]] for key in keys)

    def _together(self, function: RewardFunction, responses: Sequence[Response]) -> list[Verdict]:
        if not responses:
            return []
        workers, timeout_s = self._workers, self._timeout_s
        ask: Callable[[Any], Any] = partial(call_batch, function)
        if isinstance(function, UserFunction):
            ask, timeout_s = partial(_all_of_user, function, workers, timeout_s), math.inf
        elif _way(function) == "async":
            return call_async(function, responses, workers, timeout_s)
        calls = Calls(1)
        calls.add(ask, responses, timeout_s=timeout_s, what=_what(function))
        (found,) = _raised(calls.results())
        return [found] * len(responses) if isinstance(found, InfrastructureError) else found


def _way(function: RewardFunction) -> Way:
    return function.way if isinstance(function, UserFunction) else way_of(function)


def _what(function: RewardFunction) -> str:
    return f"the reward function {name_of(function)}"


def _one_of_user(function: UserFunction, timeout_s: float, response: Response) -> Verdict:
    (verdict,) = function.verdicts([response], 1, timeout_s)
    return verdict


def _all_of_user(
    function: UserFunction, workers: int, timeout_s: float, responses: Sequence[Response]
) -> list[Verdict]:
    return function.verdicts(responses, workers, timeout_s)


def _raised(results: Iterable[Any]) -> list[Any]:
    """The results, if none of them is an error other than InfrastructureError; else the first."""
    found = list(results)
    for result in found:
        if isinstance(result, BaseException) and not isinstance(result, InfrastructureError):
            raise result
    return found
