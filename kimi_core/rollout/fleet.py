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
5. Workers of other hosts come and go. One that has joined takes part from its first ``READY``; one
   that is lost is forgotten, and may join again. Nobody waits for one that is still on its way.

Tokens do not depend on who samples them: a draw is a function of (seed, trajectory, position) and
the weights. Last bits of log-probs depend on the rows that are decoded together. With ``exact``,
who gets what depends on the requests alone, so these bits come out the same too, unless a worker
is lost.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from typing import Protocol

from kimi_core.rollout import wire
from kimi_core.rollout.engine import EngineFailed, check_newer, check_request
from kimi_core.rollout.work import Work, WorkerGone
from kimi_core.types import Request, Sampling, SegmentColumns

LOOK_S = 0.2
"""Seconds between two looks at the clock while nothing comes."""

COME_S = 300.0
"""Seconds for which a call waits while there is no worker at all."""

RESTARTS = 5
"""Restarts of one worker in one call; the next loss ends the call."""

AHEAD = 1.25
"""Requests that a worker holds at most, as a multiple of its rows, if who gets what may vary."""

log = logging.getLogger(__name__)


class Worker(Protocol):
    """One engine somewhere. Methods that talk to it raise WorkerGone."""

    number: int
    joins: bool
    """Whether it comes by itself, from another host; the others are started here."""
    ready: bool
    """Whether it serves ``policy_version``, and that is what it was told to serve."""
    policy_version: int
    steps: int
    """Decode steps since it was started."""

    def start(self) -> None:
        """Start it, in place of what is left of it. It is ``ready`` later. If it joins by itself,
        end the connection; it may come back with another one."""
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


class Arrivals(Protocol):
    """Workers that join by themselves."""

    def fileno(self) -> int:
        """What becomes readable when one has come."""
        ...

    def take(self) -> Sequence[Worker]:
        """Those that have come since the last call. One that was here before has its old number."""
        ...

    def missing(self) -> str:
        """Why nobody will come; empty: nothing is known."""
        ...


def linger_s(workers: int) -> float:
    """Seconds for which a worker's segments wait for others, so that the master gets at most about
    500 messages a second."""
    return max(0.05, workers / 500)


class Fleet:
    """Implements ``Engine`` with several workers.

    Args:
        workers: of this host, not started yet.
        batch_rows: sequences that a worker decodes together at most.
        vocabulary, context: of the model, as for ``check_request``.
        exact: whether the bits of log-probs are to come out the same every time.
        arrivals: workers of other hosts; None: there are none.
        images: the images that the ids from -1 down name.
        hybrid: whether the workers of this host end while the fleet sleeps. It sleeps at first.
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
        arrivals: Arrivals | None = None,
        images: Sized = (),
        hybrid: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy_version = 0
        self.restarts = 0
        self._workers = list(workers)
        self._arrivals = arrivals
        self._started = False
        self._hybrid = self._asleep = hybrid
        self._most = math.inf if exact else batch_rows * AHEAD
        self._images = images
        self._check_request = partial(check_request, vocabulary=vocabulary, context=context)
        self._wanted = 0
        """The version that workers are to serve."""
        self._call = 0
        self._busy = False
        self._steps_before = 0
        self._alone_since = 0.0
        self._losses: Counter[int] = Counter()
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
            RuntimeError: the fleet sleeps.
        """
        if self._asleep:
            raise RuntimeError("The rollout workers are asleep: wake the engine before it samples")
        for request in requests:
            self._check_request(request, images=len(self._images))
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
        self._losses.clear()
        self._wanted = version
        for worker in self._there():
            if self._started or worker.joins:
                self._serve(worker)
            else:
                worker.start()
        self._started = True
        self._wait_until_ready(version)
        self.policy_version = version

    def sleep(self) -> None:
        """End the workers of this host, if they share its devices with the trainer. The nursery
        stays, which holds no weights. Without that, a worker that has no work uses only memory."""
        if not self._hybrid or self._asleep:
            return
        self._steps_before += sum(one.steps for one in self._workers if not one.joins)
        self._asleep = True
        for worker in self._workers:
            if not worker.joins:
                worker.close()

    def wake(self) -> None:
        """Start the workers that ``sleep`` has ended, with the version that was served last.

        Raises:
            EngineFailed: one could not be started, or refused the weights.
        """
        if not self._asleep or not self._started:
            return
        self._asleep = False
        for worker in self._workers:
            if not worker.joins:
                worker.start()
        self._wait_until_ready(self.policy_version)

    def _there(self) -> list[Worker]:
        """The workers that have not been put to sleep."""
        return [one for one in self._workers if one.joins or not self._asleep]

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
        self._busy = True
        self._losses.clear()
        self._call += 1
        work = Work(requests, len(self._workers))
        most_steps = max(request.steps for request in requests)
        self._alone_since = time.monotonic()
        try:
            self._wait_until_ready(self.policy_version)  # One may have ended since the last call.
            while work.open:
                self._feed(work, sampling, most_steps)
                for worker in self._with_news(LOOK_S, work):
                    for message in self._take(worker, work):
                        if message.segments is not None and message.call == self._call:
                            yield message.segments
                for worker in list(self._workers):
                    if work.held[worker.number] or not worker.ready:
                        self._check(worker, work)
                self._check_not_alone()
        finally:
            self._busy = False
            if work.open:
                self._stop_all()

    def _feed(self, work: Work, sampling: Sampling, most_steps: int) -> None:
        """Give what waits to workers that have room, the least loaded first."""
        given: dict[int, list[Request]] = {}
        while work.waiting:
            free = [w for w in self._workers if w.ready and work.held[w.number] < self._most]
            if not free:
                break
            number = min(free, key=lambda w: (work.held[w.number], w.number)).number
            given.setdefault(number, []).extend(work.give(number))
        for worker in [one for one in self._workers if one.number in given]:
            try:
                if worker.number not in work.begun:
                    worker.begin(self._call, sampling, most_steps)
                    work.begun.add(worker.number)
                worker.feed(given[worker.number])
            except WorkerGone as gone:
                self._lost(worker, gone, work)

    def _with_news(self, timeout_s: float, work: Work | None = None) -> list[Worker]:
        """The workers that have said something, or ended; waits for the first, for so long.
        Workers that have come join meanwhile."""
        by_file = {worker.fileno(): worker for worker in self._there()}
        door = [self._arrivals.fileno()] if self._arrivals else []
        found = wait([*by_file, *door], timeout=timeout_s)
        if self._arrivals and door[0] in found:
            for worker in self._arrivals.take():
                self._join(worker, work)
        said = sorted(one for one in found if isinstance(one, int) and one in by_file)
        return [by_file[one] for one in said if by_file[one] in self._workers]

    def _join(self, worker: Worker, work: Work | None) -> None:
        for other in [one for one in self._workers if one.number == worker.number]:
            self._lost(other, WorkerGone(f"Rollout worker {other.number} has come again"), work)
        self._workers.append(worker)
        self._serve(worker, work)

    def _serve(self, worker: Worker, work: Work | None = None) -> None:
        try:
            worker.serve(self._wanted)
        except WorkerGone as gone:
            self._lost(worker, gone, work)

    def _take(self, worker: Worker, work: Work | None = None) -> list[wire.Message]:
        """What a worker has said until it was lost; its segments are noted in ``work``."""
        taken: list[wire.Message] = []
        try:
            for message in worker.take():
                if message.kind == wire.FAULT and (worker.joins or work is not None):
                    raise WorkerGone(f"Rollout worker {worker.number} failed: {message.text}")
                if work and message.segments is not None and message.call == self._call:
                    work.note(worker.number, message, self.policy_version)
                taken.append(message)
        except WorkerGone as gone:
            self._lost(worker, gone, work)
        return taken

    def _check(self, worker: Worker, work: Work | None = None) -> None:
        try:
            worker.check()
        except WorkerGone as gone:
            self._lost(worker, gone, work)

    def _lost(self, worker: Worker, gone: WorkerGone, work: Work | None = None) -> None:
        """Put what a worker had not finished back into the queue, and start it a second time."""
        back = work.take_back(worker.number) if work else 0
        what = "may join again" if worker.joins else "starts again"
        log.warning("%s: %d trajectories go on elsewhere, and it %s", gone, back, what)
        self._steps_before += worker.steps
        worker.start()
        self.restarts += 1
        if worker.joins:
            self._workers.remove(worker)
            return
        self._losses[worker.number] += 1
        if self._losses[worker.number] > RESTARTS:
            raise EngineFailed(f"{gone}; it was started {RESTARTS} times in a row before") from gone

    def _check_not_alone(self) -> None:
        """Raises EngineFailed if there is no worker, and none is on its way."""
        if self._workers:
            self._alone_since = time.monotonic()
            return
        why = self._arrivals.missing() if self._arrivals else "none was asked for"
        if not why and time.monotonic() - self._alone_since > COME_S:
            why = f"none has joined for {COME_S:g} s"
        if why:
            raise EngineFailed(f"There is no rollout worker: {why}")

    def _wait_until_ready(self, version: int) -> None:
        """Wait until all workers serve ``version``, except those that have only just joined.

        Raises:
            EngineFailed: one of this host cannot.
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
            late = [one for one in self._there() if not one.ready]
            late = [one for one in late if one.policy_version >= 0 or not one.joins]
            if not late:
                break
            for worker in late:
                self._check(worker)
            timeout_s = LOOK_S
        for worker in self._there():
            if not worker.joins and worker.policy_version != version:
                raise EngineFailed(
                    f"Rollout worker {worker.number} serves version {worker.policy_version} of the "
                    f"weights and not {version}: was another one published?"
                )

    def _stop_all(self) -> None:
        for worker in self._workers:
            if worker.ready:
                with suppress(WorkerGone):  # The next call finds out.
                    worker.stop()
