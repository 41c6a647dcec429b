"""Verdicts on many responses at once."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import cast

from kimi_core.reward.base import InfrastructureError, LimitReached, RewardOutage, name_of
from kimi_core.reward.calls import Response, Verdict, call_async, call_batch, call_one, way_of
from kimi_core.reward.combined import CombinedReward, Reward
from kimi_core.reward.threads import call_all
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
    if not responses:
        return []
    if isinstance(function, CombinedReward):
        columns = [
            verdicts_on(part.function, responses, workers, timeout_s) for part in function.parts
        ]
        return [function.combine(row) for row in zip(*columns, strict=True)]
    if isinstance(function, UserFunction):
        return _in_processes(function, responses, workers, timeout_s)
    way = way_of(function)
    if way == "async":
        return call_async(function, responses, workers, timeout_s)
    what = f"the reward function {name_of(function)}"
    if way == "batch":
        (found,) = call_all(
            partial(call_batch, function), [responses], workers=1, timeout_s=timeout_s, what=what
        )
        return [found] * len(responses) if isinstance(found, InfrastructureError) else found
    return call_all(
        partial(call_one, function), responses, workers=workers, timeout_s=timeout_s, what=what
    )


def _in_processes(
    function: UserFunction, responses: Sequence[Response], workers: int, timeout_s: float
) -> list[Verdict]:
    def verdicts(given: Sequence[Response]) -> list[Verdict]:
        return function.verdicts(given, workers, timeout_s)

    calls = [[one] for one in responses] if function.way == "one" else [responses]
    what = f"the reward function {name_of(function)}"
    # The processes keep the time, so that none is left behind that still runs.
    found = call_all(verdicts, calls, workers=workers, timeout_s=math.inf, what=what)
    return [verdict for one in found for verdict in cast(list[Verdict], one)]
