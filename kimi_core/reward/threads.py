"""Calls of a user's function in threads, with a deadline for each call."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from kimi_core.reward.base import InfrastructureError

Given = TypeVar("Given")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

SAY_AFTER_S = 30.0
"""A call that takes longer is named once, so that a user knows what a run waits for."""

LOOK_S = 0.2
"""Seconds between two looks at the clock. Ctrl-C is heard as often."""


def call_all(
    function: Callable[[Given], Result],
    given: Sequence[Given],
    *,
    workers: int,
    timeout_s: float,
    what: str,
) -> list[Result | InfrastructureError]:
    """``function`` of each of ``given``, in order, in ``workers`` threads.

    A call that takes longer than ``timeout_s`` is given up: its entry is an InfrastructureError.
    Python cannot end its thread, so another thread takes its place. All are daemons, so that they
    cannot keep the process alive.

    Args:
        what: names the calls in messages.

    Raises: whatever a call raises; if several do, that of the first of ``given``.
    """
    done: SimpleQueue[tuple[int, Result | BaseException]] = SimpleQueue()
    pending, lock = iter(range(len(given))), threading.Lock()
    started: dict[int, float] = {}

    def work() -> None:
        while True:
            with lock:
                index = next(pending, None)
            if index is None:
                return
            started[index] = time.monotonic()
            try:
                done.put((index, function(given[index])))
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                done.put((index, error))

    def begin() -> None:
        threading.Thread(target=work, daemon=True, name="reward").start()

    for _ in range(min(workers, len(given))):
        begin()
    results: dict[int, Result | BaseException] = {}
    named: set[int] = set()
    while len(results) < len(given):
        try:
            index, result = done.get(timeout=LOOK_S)
            results.setdefault(index, result)
            continue
        except Empty:
            now = time.monotonic()
        for index, start in list(started.items()):
            if index not in results and now - start > timeout_s:
                results[index] = InfrastructureError(f"{what} did not return in {timeout_s:g} s")
                begin()
            elif index not in results and index not in named and now - start > SAY_AFTER_S:
                named.add(index)
                log.warning("Waiting for %s, which has taken %.0f s", what, now - start)
    ordered = [results[index] for index in range(len(given))]
    for result in ordered:
        if isinstance(result, BaseException) and not isinstance(result, InfrastructureError):
            raise result
    return ordered  # type: ignore[return-value]
