"""Verdicts on many responses at once."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kimi_core.reward.base import (
    InfrastructureError,
    LimitReached,
    RewardFunction,
    RewardOutage,
    score,
)
from kimi_core.types import Prompt

log = logging.getLogger(__name__)


def judge_all(
    function: RewardFunction,
    responses: Sequence[tuple[Prompt, str]],
    *,
    workers: int,
    outage_from: int,
) -> list[float | None]:
    """Score responses, in order; None stands for a verdict that could not be reached.

    Args:
        workers: threads that call ``function``. With 1 it is called in this thread.
        outage_from: fewer failures than this are never an outage, so that a single response that
            nobody can judge does not stop a run.

    Raises:
        RewardError: as `score` raises it; if several do, that of the first response.
        RewardOutage: more than half of the verdicts, and at least ``outage_from``, failed for a
            reason other than a limit that the response reached.
    """

    def verdict(response: tuple[Prompt, str]) -> float | InfrastructureError:
        try:
            return score(function, *response)
        except InfrastructureError as error:
            log.warning("No verdict on a response to prompt %d: %s", response[0].id, error)
            return error

    if workers == 1:
        verdicts = [verdict(response) for response in responses]
    else:
        with ThreadPoolExecutor(workers, thread_name_prefix="reward") as threads:
            verdicts = list(threads.map(verdict, responses))
    missing = [one for one in verdicts if isinstance(one, InfrastructureError)]
    failures = [one for one in missing if not isinstance(one, LimitReached)]
    if len(failures) >= outage_from and 2 * len(failures) > len(verdicts):
        raise RewardOutage(
            f"{len(failures)} of {len(verdicts)} verdicts could not be reached, the last because: "
            f"{failures[-1]}. Repair the checker and start again: --resume continues the run and "
            "judges these responses a second time"
        ) from failures[-1]
    return [None if isinstance(one, InfrastructureError) else one for one in verdicts]
