"""Many rollout workers as one engine.

1. ``serve`` starts the workers, and later has each switch to the version that was published. It
   waits for all of them.
2. ``generate`` has one queue of requests, the longest contexts first. A worker gets the next ones
   while it has room: all that wait if the bits of a run are to come out the same every time, else
   a little more than its rows.
3. Workers send the tokens of several segments in one message, as columns. The master looks at
   columns only, and hands them on; the rollout phase stores them.
4. A worker that ends, hangs or is cut off is seen at its connection. What it had not finished goes
   back into the queue, each trajectory from its last token that came here. Tokens that it had not
   sent are sampled once more. The worker is started a second time, and joins at the current version
   when it is ready.

Tokens do not depend on who samples them: a draw is a function of (seed, trajectory, position) and
the weights. Last bits of log-probs depend on the rows that are decoded together. With ``exact``,
who gets what depends on the requests alone, so these bits come out the same too, unless a worker
is lost.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from multiprocessing.connection import wait
from typing import Protocol

import numpy as np

from kimi_core.rollout import wire
from kimi_core.rollout.engine import EngineFailed, check_newer, check_request, order
from kimi_core.types import Request, Sampling, SegmentColumns

LOOK_S = 0.2
"""Seconds between two looks at the clock while nothing comes."""

RESTARTS = 5
"""Restarts of one worker in one call; the next loss ends the call."""

AHEAD = 1.25
"""Requests that a worker holds at most, as a multiple of its rows, if who gets what may vary."""

log = logging.getLogger(__name__)


class WorkerGone(RuntimeError):
    """A worker ended, hung or was cut off; the message says which and how."""


class Worker(Protocol):
    """One engine somewhere. Methods that talk to it raise WorkerGone."""

    number: int
    ready: bool
    """Whether it serves ``policy_version``."""
    policy_version: int
    steps: int
    """Decode steps since it was started."""

    def start(self) -> None:
        """Start it, in place of what is left of it. It is ``ready`` later."""
        ...

    def fileno(self) -> int:
        """What becomes readable when it says something or ends."""
        ...

    def serve(self, version: int) -> None:
        """Have it switch to the weights that were published; it is ``ready`` when it has."""
        ...

    def begin(self, call: int, sampling: Sampling, most_steps: int) -> None:
        """Announce a call; no request of it may add more than ``most_steps`` tokens."""
        ...

    def feed(self, requests: Sequence[Request]) -> None:
        """Give it more requests of the call."""
        ...

    def stop(self) -> None:
        """Have it give up what it was fed."""
        ...

    def take(self) -> list[wire.Message]:
        """What it has said since the last call; waits for the rest of a message at most."""
        ...

    def check(self) -> None:
        """Look at the deadlines of a worker that has something to do."""
        ...

    def close(self) -> None:
        """End it. Safe to call twice."""
        ...


def linger_s(workers: int) -> float:
    """Seconds for which a worker's segments wait for others, so that the master gets at most about
    500 messages a second."""
    return max(0.05, workers / 500)


class Fleet:
    """Implements ``Engine`` with several workers.

    Args:
        workers: not started yet.
        batch_rows: sequences that a worker decodes together at most.
        vocabulary, context: of the model, as for ``check_request``.
        exact: whether the bits of log-probs are to come out the same every time.
        on_close: called when all workers have ended.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        batch_rows: int,
        vocabulary: int,
        context: int | None,
        exact: bool,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy_version = 0
        self.restarts = 0
        self._workers = list(workers)
        self._started = False
        self._most = math.inf if exact else batch_rows * AHEAD
        self._vocabulary, self._context = vocabulary, context
        self._call = 0
        self._busy = False
        self._steps_before = 0
        self._losses = [0] * len(workers)
        self._on_close = on_close

    @property
    def decode_steps(self) -> int:
        """Of all workers together."""
        return self._steps_before + sum(worker.steps for worker in self._workers)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[SegmentColumns]:
        """Extend every request by at most its budget; yield what comes, a message at a time.

        Raises:
            ValueError: a request is empty, or exceeds the model's vocabulary or its context; at
                once, before anything is generated.
            EngineFailed: a worker was lost time after time, or serves other weights.
        """
        for request in requests:
            check_request(request, vocabulary=self._vocabulary, context=self._context)
        return self._generate(list(requests), sampling)

    def serve(self, version: int) -> None:
        """Have all workers switch to the version that was published last; start them at first.

        Raises:
            ValueError: a rollout is under way, or the version is older than the present one.
            EngineFailed: a worker refused the weights, or could not be started.
        """
        if self._busy:
            raise ValueError(f"Cannot serve version {version} while a rollout is under way")
        check_newer(version, self.policy_version)
        self._losses = [0] * len(self._workers)
        for worker in self._workers:
            if not self._started:
                worker.start()
                continue
            try:
                worker.serve(version)
            except WorkerGone as gone:
                self._lost(worker, gone)
        self._started = True
        self._wait_until_ready(version)
        self.policy_version = version

    def sleep(self) -> None:
        """Do nothing: on a CPU a worker without work uses nothing but its memory."""

    def wake(self) -> None:
        """Do nothing, as ``sleep`` does."""

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        for worker in self._workers:
            worker.close()
        self._on_close()
        self._started = False

    def _generate(self, requests: list[Request], sampling: Sampling) -> Iterator[SegmentColumns]:
        if self._busy:
            raise ValueError("The engine is generating already: exhaust or close that call first")
        if not requests:
            return
        if not self._started:
            raise EngineFailed("The rollout workers have no weights: publish and serve them first")
        self._busy, self._losses = True, [0] * len(self._workers)
        self._call += 1
        work = _Work(requests, len(self._workers))
        most_steps = max(request.steps for request in requests)
        try:
            self._wait_until_ready(self.policy_version)  # One may have ended since the last call.
            while work.open:
                self._feed(work, sampling, most_steps)
                for worker in self._with_news(LOOK_S):
                    for message in self._take(worker, work):
                        if message.segments is not None and message.call == self._call:
                            yield message.segments
                for worker in self._workers:
                    if work.held[worker.number] or not worker.ready:
                        self._check(worker, work)
        finally:
            self._busy = False
            if work.open:
                self._stop_all()

    def _feed(self, work: "_Work", sampling: Sampling, most_steps: int) -> None:
        """Give what waits to workers that have room, the least loaded first."""
        given: dict[int, list[Request]] = {}
        while work.waiting:
            free = [w for w in self._workers if w.ready and work.held[w.number] < self._most]
            if not free:
                break
            number = min(free, key=lambda w: (work.held[w.number], w.number)).number
            given.setdefault(number, []).extend(work.give(number))
        for number, requests in given.items():
            worker = self._workers[number]
            try:
                if number not in work.begun:
                    worker.begin(self._call, sampling, most_steps)
                    work.begun.add(number)
                worker.feed(requests)
            except WorkerGone as gone:
                self._lost(worker, gone, work)

    def _with_news(self, timeout_s: float) -> list[Worker]:
        """The workers that have said something, or ended; waits for the first, for so long."""
        by_file = {worker.fileno(): worker for worker in self._workers}
        found = wait(list(by_file), timeout=timeout_s)
        return [by_file[one] for one in sorted(one for one in found if isinstance(one, int))]

    def _take(self, worker: Worker, work: "_Work | None" = None) -> list[wire.Message]:
        """What a worker has said until it was lost; its segments are noted in ``work``."""
        taken: list[wire.Message] = []
        try:
            for message in worker.take():
                if message.kind == wire.FAULT and work is not None:
                    raise WorkerGone(f"Rollout worker {worker.number} failed: {message.text}")
                if work and message.segments is not None and message.call == self._call:
                    work.note(worker.number, message, self.policy_version)
                taken.append(message)
        except WorkerGone as gone:
            self._lost(worker, gone, work)
        return taken

    def _check(self, worker: Worker, work: "_Work | None" = None) -> None:
        try:
            worker.check()
        except WorkerGone as gone:
            self._lost(worker, gone, work)

    def _lost(self, worker: Worker, gone: WorkerGone, work: "_Work | None" = None) -> None:
        """Put what a worker had not finished back into the queue, and start it a second time."""
        back = work.take_back(worker.number) if work else 0
        log.warning("%s: %d trajectories go on elsewhere, and it starts again", gone, back)
        self._steps_before += worker.steps
        worker.start()
        self.restarts += 1
        self._losses[worker.number] += 1
        if self._losses[worker.number] > RESTARTS:
            raise EngineFailed(f"{gone}; it was started {RESTARTS} times in a row before") from gone

    def _wait_until_ready(self, version: int) -> None:
        """Wait until all workers serve ``version``.

        Raises:
            EngineFailed: one cannot.
        """
        timeout_s = 0.0
        while True:
            for worker in self._with_news(timeout_s):
                for message in self._take(worker):
                    if message.kind == wire.FAULT:
                        raise EngineFailed(
                            f"Rollout worker {worker.number} does not serve version {version}: "
                            f"{message.text}"
                        )
            late = [worker for worker in self._workers if not worker.ready]
            if not late:
                break
            for worker in late:
                self._check(worker)
            timeout_s = LOOK_S
        for worker in self._workers:
            if worker.policy_version != version:
                raise EngineFailed(
                    f"Rollout worker {worker.number} serves version {worker.policy_version} of the "
                    f"weights and not {version}: was another one published?"
                )

    def _stop_all(self) -> None:
        for worker in self._workers:
            if worker.ready:
                with suppress(WorkerGone):  # The next call finds out.
                    worker.stop()


class _Work:
    """One call: which worker has which request, and how far each has come."""

    def __init__(self, requests: Sequence[Request], workers: int) -> None:
        self.open = len(requests)
        """Requests that are not answered."""
        self.held = [0] * workers
        """Open requests at each worker."""
        self.begun: set[int] = set()
        """Workers that know of the call."""
        self.waiting: deque[list[Request]] = deque(_in_runs(requests, workers))
        """Requests that no worker has; those with equal contexts, which are prefilled once, go
        to the same worker."""
        self._requests = {request.trajectory_id: request for request in requests}
        self._ids = np.array(sorted(self._requests), np.int64)
        self._left = np.array([self._requests[key].steps for key in self._ids.tolist()], np.int64)
        """Tokens that each may still get in this call."""
        self._owner = np.full(self.open, -1)
        """−1: nobody has it, because it waits or is answered."""
        self._came: list[list[SegmentColumns]] = [[] for _ in range(workers)]
        """What each worker has sent."""

    def give(self, worker: int) -> list[Request]:
        """The next requests, which ``worker`` has from now on."""
        requests = self.waiting.popleft()
        self._owner[self._at([request.trajectory_id for request in requests])] = worker
        self.held[worker] += len(requests)
        return requests

    def note(self, worker: int, message: wire.Message, version: int) -> None:
        """Take account of segments that came.

        Raises:
            WorkerGone: they are not what the worker was asked for.
        """
        columns = message.segments
        assert columns is not None
        keys, lengths = columns.trajectory_ids, columns.lengths
        at = self._ids.searchsorted(keys)
        at[at == len(self._ids)] = 0
        theirs = (self._ids[at] == keys) & (self._owner[at] == worker) & (lengths > 0)
        if message.policy_version != version or not theirs.all():
            raise WorkerGone(f"Rollout worker {worker} sent segments that nobody asked it for")
        np.subtract.at(self._left, at, lengths)
        left = self._left[at]
        if left.min() < 0:
            raise WorkerGone(f"Rollout worker {worker} sent more tokens than it was asked for")
        answered = (left == 0) | (columns.end_reasons > 0)
        if answered.any():
            done = np.unique(at[answered])
            self._owner[done] = -1
            self.held[worker] -= len(done)
            self.open -= len(done)
        self._came[worker].append(columns)

    def take_back(self, worker: int) -> int:
        """Let what ``worker`` has not answered wait again, from its last token; return how many."""
        at = np.flatnonzero(self._owner == worker)
        keys = self._ids[at]
        parts: dict[int, list[np.ndarray]] = {key: [] for key in keys.tolist()}
        for columns in self._came[worker]:
            for place in np.flatnonzero(np.isin(columns.trajectory_ids, keys)).tolist():
                segment = columns.segment(place)
                parts[segment.trajectory_id].append(segment.token_ids)
        rest = [_rest(self._requests[key], new) for key, new in parts.items()]
        self._requests |= {request.trajectory_id: request for request in rest}
        self._left[at] = [request.steps for request in rest]
        self._owner[at] = -1
        self.held[worker], self._came[worker] = 0, []
        self.begun.discard(worker)
        self.waiting.extendleft(reversed(_in_runs(rest, len(self.held))))
        return len(rest)

    def _at(self, keys: Sequence[int]) -> np.ndarray:
        return np.searchsorted(self._ids, keys)


def _in_runs(requests: Sequence[Request], workers: int) -> list[list[Request]]:
    """Requests with equal contexts together, the longest first; no run is more than a share."""
    share = -(-len(requests) // workers)
    ordered = sorted(requests, key=order, reverse=True)
    runs = [list(run) for _, run in groupby(ordered, key=order)]
    return [run[start : start + share] for run in runs for start in range(0, len(run), share)]


def _rest(request: Request, new: Sequence[np.ndarray]) -> Request:
    """What is left of a request after ``new`` tokens."""
    made = sum(map(len, new))
    return replace(
        request,
        token_ids=np.concatenate([request.token_ids, *new]),
        budget=request.budget - made,
        remaining=request.remaining - made,
    )
