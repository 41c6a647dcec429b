"""Calls of a user's function in threads, with a deadline for each call."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from kimi_core.reward.base import InfrastructureError

log = logging.getLogger(__name__)

SAY_AFTER_S = 30.0
"""A call that takes longer is named once, so that a user knows what a run waits for."""

LOOK_S = 0.2
"""Seconds between two looks at the clock. Ctrl-C is heard as often."""


class Calls:
    """Calls in at most ``workers`` threads. Each begins when it is added, or when a thread is free.

    A call that takes longer than its time limit is given up in ``results``. Python cannot end its
    thread, so another thread takes its place. All are daemons, so that they never keep the process
    alive.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._jobs: list[_Job] = []
        self._threads = 0
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        """Numbers of jobs; None ends a thread."""
        self._done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._found: dict[int, Any] = {}

    def add(
        self, function: Callable[[Any], Any], given: Any, *, timeout_s: float, what: str
    ) -> int:
        """Have ``function(given)`` called; return its place in ``results``.

        Args:
            what: names the function in messages.
        """
        self._jobs.append(_Job(function, given, timeout_s, what))
        self._queue.put(len(self._jobs) - 1)
        if self._threads < self._workers:
            self._begin()
        return len(self._jobs) - 1

    def results(self) -> list[Any]:
        """What each call returned or raised; waits for all. Nothing is added after that.

        InfrastructureError stands for a call that was given up.
        """
        named: set[int] = set()
        while len(self._found) < len(self._jobs):
            try:
                number, result = self._done.get(timeout=LOOK_S)
                self._found.setdefault(number, result)
                continue
            except Empty:
                now = time.monotonic()
            for number, job in enumerate(self._jobs):
                taken_s = now - job.started if job.started else 0.0
                if number not in self._found and taken_s > job.timeout_s:
                    self._found[number] = InfrastructureError(
                        f"{job.what} did not return in {job.timeout_s:g} s"
                    )
                    self._begin()
                elif not (number in self._found or number in named) and taken_s > SAY_AFTER_S:
                    named.add(number)
                    log.warning("Waiting for %s, which has taken %.0f s", job.what, taken_s)
        for _ in range(self._threads):
            self._queue.put(None)
        return [self._found[number] for number in range(len(self._jobs))]

    def _begin(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, daemon=True, name="reward").start()

    def _work(self) -> None:
        while (number := self._queue.get()) is not None:
            job = self._jobs[number]
            job.started = time.monotonic()
            try:
                self._done.put((number, job.function(job.given)))
            except BaseException as error:  # noqa: BLE001 - the caller of ``results`` gets it
                self._done.put((number, error))


@dataclass
class _Job:
    function: Callable[[Any], Any]
    given: Any
    timeout_s: float
    what: str
    started: float = 0.0
    """0: it waits for a thread."""
