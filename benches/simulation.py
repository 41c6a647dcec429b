"""A discrete-event simulation of one rollout phase: engines, the master's queue, budgets, faults.

Only what decides the time of a phase is simulated. An engine decodes one token of each of its rows
a step. A step takes ``Costs.step_s`` seconds, which grows with the rows and their contexts. Engines
send what they have sampled every ``linger_s`` seconds, and at once when a row is free. The master
deals requests to all engines in turn at the start, the longest context first. Then it takes one
message at a time and answers it with new requests.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of one engine."""

    step_s: float
    """A decode step without rows: launches, and reading the weights."""
    row_s: float
    """A step's extra time for each row."""
    context_s: float
    """A step's extra time for each position of a row's context."""
    prefill_s: float
    """Prefill of one position."""
    prefill_pair_s: float = 0.0
    """Prefill of one pair of positions that attend to each other."""
    enter_s: float = 0.0
    """A pass in which requests enter, in addition to their prefill."""

    def prefill(self, context: int) -> float:
        return self.prefill_s * context + self.prefill_pair_s * context * context / 2


@dataclass(frozen=True)
class Master:
    """Seconds of the process that stores segments, and of the network to it."""

    message_s: float = 1.2e-4
    segment_s: float = 1e-6
    latency_s: float = 1e-4
    segment_tokens: int = 64
    linger_s: float = 0.05
    asks: bool = True
    """An engine that has a free row sends at once. The workers of today wait for ``linger_s``."""


@dataclass(frozen=True)
class Faults:
    """When engines die, and what follows."""

    mean_s: float = math.inf
    """Mean time between two deaths of one engine, exponentially distributed."""
    seen_s: float = 2.0
    back_s: float = 60.0
    """From the death to the engine's first new request."""


@dataclass
class Row:
    """One open trajectory, as the master gave it to an engine."""

    context: int
    wanted: int
    """Tokens that the engine is to add."""

    @property
    def positions(self) -> int:
        return self.context + self.wanted


@dataclass
class Phase:
    """What came of a phase."""

    seconds: float = 0.0
    tokens: int = 0
    lost: int = 0
    """Tokens that were sampled and not sent when their engine died."""
    steps: int = 0
    deaths: int = 0
    messages: int = 0
    master_s: float = 0.0
    prefill_s: float = 0.0
    """Over all engines."""
    busy_s: float = 0.0
    """Decoding and prefill, over all engines."""


@dataclass
class Engine:
    rows: list[tuple[int, int, Row]] = field(default_factory=list)
    """A heap by the step at which a row ends: (step, number, row)."""
    waiting: deque[Row] = field(default_factory=deque)
    ended: list[tuple[int, int, Row]] = field(default_factory=list)
    """Entries of ``rows`` that have ended since the last message."""
    unsent: int = 0
    step: int = 0
    sent_step: int = 0
    """The step of the last message."""
    contexts: int = 0
    """Sum of the rows' contexts."""
    reserved: int = 0
    """Positions that the rows will have taken at their ends."""
    promised: int = 0
    """The same of those that wait."""
    time: float = 0.0
    """Up to here it is simulated; after a prefill this is in the future."""
    stamp: int = 0
    """Events of an earlier stamp are void."""
    alive: bool = True
    asked: bool = False
    """It has told the master that it waits."""


class Rollout:
    """Simulates one phase; ``run`` returns what came of it.

    Args:
        trajectories: pairs of context and tokens wanted.
        rows: of each engine.
        positions: keys and values that an engine has room for.
    """

    def __init__(
        self,
        trajectories: Sequence[tuple[int, int]],
        *,
        engines: int,
        rows: int,
        positions: float = math.inf,
        costs: Costs,
        master: Master,
        faults: Faults,
        rng: np.random.Generator,
    ):
        # By the context alone: how long a response will be is not known.
        ordered = sorted(trajectories, key=lambda one: -one[0])
        self.queue = deque(Row(context, wanted) for context, wanted in ordered if wanted > 0)
        self.left = len(self.queue)
        self.engines = [Engine() for _ in range(engines)]
        self.rows, self.positions = rows, positions
        self.costs, self.master, self.faults = costs, master, faults
        self.rng = rng
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = 0
        self.master_free = 0.0
        self.phase = Phase()

    def run(self) -> Phase:
        takers = list(self.engines)
        while takers:
            takers = [one for one in takers if self._give(one)]
        for index in range(len(self.engines)):
            self._at(self.master.latency_s, "answer", index)
            self._plan_death(index, 0.0)
        while self.left:
            now, _, kind, index, stamp = heapq.heappop(self.events)
            if kind in ("row", "message") and stamp != self.engines[index].stamp:
                continue
            getattr(self, f"_on_{kind}")(now, index)
        return self.phase

    def _at(self, when: float, kind: str, index: int) -> None:
        self.number += 1
        stamp = self.engines[index].stamp
        heapq.heappush(self.events, (when, self.number, kind, index, stamp))

    def _plan_death(self, index: int, now: float) -> None:
        if self.faults.mean_s < math.inf:
            self._at(now + self.rng.exponential(self.faults.mean_s), "death", index)

    def _time_of(self, one: Engine, steps: float) -> float:
        """Seconds that the next ``steps`` steps take, while no row comes or goes."""
        n = len(one.rows)
        first = self.costs.step_s + self.costs.row_s * n + self.costs.context_s * one.contexts
        return steps * first + self.costs.context_s * n * steps * (steps - 1) / 2

    def _steps_in(self, one: Engine, seconds: float) -> int:
        """Whole steps that fit into ``seconds``: the inverse of ``_time_of``."""
        n = len(one.rows)
        a = self.costs.context_s * n / 2
        b = self.costs.step_s + self.costs.row_s * n + self.costs.context_s * one.contexts - a
        steps = seconds / b if a == 0 else (math.sqrt(b * b + 4 * a * seconds) - b) / (2 * a)
        return int(steps + 1e-9)

    def _advance(self, one: Engine, now: float) -> None:
        """Decode until ``now``; at most to the first row's end."""
        if not one.rows or now <= one.time:
            return
        steps = min(self._steps_in(one, now - one.time), one.rows[0][0] - one.step)
        spent = self._time_of(one, steps)
        one.time += spent
        self.phase.busy_s += spent
        one.step += steps
        one.contexts += steps * len(one.rows)
        one.unsent += steps * len(one.rows)
        self.phase.steps += steps
        while one.rows and one.rows[0][0] <= one.step:
            entry = heapq.heappop(one.rows)
            one.contexts -= entry[2].positions
            one.reserved -= entry[2].positions
            one.ended.append(entry)

    def _fill(self, one: Engine, index: int, now: float) -> None:
        """Take waiting requests into free rows and plan the next event."""
        one.time = max(one.time, now) if not one.rows else one.time
        if self._has_room(one) and one.waiting:
            one.time += self.costs.enter_s
            self.phase.busy_s += self.costs.enter_s
        while self._has_room(one) and one.waiting:
            row = one.waiting.popleft()
            one.promised -= row.positions
            one.reserved += row.positions
            spent = self.costs.prefill(row.context)
            one.time += spent
            self.phase.prefill_s += spent
            self.phase.busy_s += spent
            self.number += 1
            heapq.heappush(one.rows, (one.step + row.wanted, self.number, row))
            one.contexts += row.context
        if one.rows:
            steps = one.rows[0][0] - one.step
            self._at(max(now, one.time + self._time_of(one, steps)) + 1e-12, "row", index)
        asks = self.master.asks and not one.asked and self._has_room(one)
        if asks or (one.ended and not one.rows):
            self._at(now, "message", index)

    def _has_room(self, one: Engine) -> bool:
        """Whether the first that waits may begin; without one, whether a mean row might."""
        mean = one.reserved // max(1, len(one.rows))
        more = one.waiting[0].positions if one.waiting else mean
        fits = not one.rows or one.reserved + more <= self.positions
        return len(one.rows) < self.rows and fits

    def _give(self, one: Engine) -> bool:
        """Give an engine the first request of the queue, up to a quarter more than it can hold."""
        if not self.queue:
            return False
        row = self.queue[0]
        taken = one.reserved + one.promised
        fits = not taken or taken + row.positions <= 1.25 * self.positions
        if not fits or len(one.rows) + len(one.waiting) >= self.rows + self.rows // 4:
            return False
        one.waiting.append(self.queue.popleft())
        one.promised += row.positions
        return True

    def _on_row(self, now: float, index: int) -> None:
        one = self.engines[index]
        self._advance(one, now)
        self._fill(one, index, now)

    def _on_message(self, now: float, index: int) -> None:
        """An engine sends what it has; the answer arrives when the master has handled it."""
        one = self.engines[index]
        self._advance(one, now)
        one.asked = True
        segments = math.ceil(one.unsent / self.master.segment_tokens)
        spent = self.master.message_s + segments * self.master.segment_s
        arrived = now + self.master.latency_s
        self.master_free = max(self.master_free, arrived) + spent
        self.phase.master_s += spent
        self.phase.messages += 1
        self.phase.tokens += one.unsent
        self.left -= len(one.ended)
        one.unsent, one.ended, one.sent_step = 0, [], one.step
        self.phase.seconds = self.master_free
        self._at(self.master_free + self.master.latency_s, "answer", index)
        if one.rows:
            self._at(now + self.master.linger_s, "message", index)

    def _on_answer(self, now: float, index: int) -> None:
        one = self.engines[index]
        if not one.alive:
            return
        while self._give(one):
            pass
        one.asked = not self.queue  # Then asking is of no use.
        if one.waiting and self._has_room(one):
            self._advance(one, now)
            one.stamp += 1
            self._fill(one, index, now)
            self._at(now + self.master.linger_s, "message", index)

    def _on_death(self, now: float, index: int) -> None:
        one = self.engines[index]
        self._advance(one, now)
        self.phase.deaths += 1
        self.phase.lost += one.unsent
        one.alive = False
        one.stamp += 1
        self._at(now + self.faults.seen_s, "seen", index)
        self._at(now + max(self.faults.back_s, self.faults.seen_s), "back", index)

    def _on_seen(self, now: float, index: int) -> None:
        """The master gives the dead engine's trajectories to others, from their last sent token."""
        one = self.engines[index]
        for end, _, row in [*one.ended, *one.rows]:
            sent = max(0, one.sent_step - (end - row.wanted))
            self.queue.appendleft(Row(row.context + sent, row.wanted - sent))
        self.queue.extendleft(one.waiting)
        self.engines[index] = Engine(alive=False, stamp=one.stamp, time=now)
        for other, engine in enumerate(self.engines):
            if engine.alive and not engine.rows and not engine.waiting:
                self._at(now, "answer", other)

    def _on_back(self, now: float, index: int) -> None:
        one = self.engines[index]
        one.alive = True
        one.time = now
        self._at(now, "message", index)
        self._plan_death(index, now)
