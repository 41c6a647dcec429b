"""What the workers of a fleet have to do in one call, who does it, and how far it has come."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from kimi_core.rollout import wire
from kimi_core.rollout.engine import order
from kimi_core.types import Request, SegmentColumns


class WorkerGone(RuntimeError):
    """A worker ended, hung or was cut off; the message says which and how."""


class Work:
    """One call: which worker has which request, and how far each has come.

    Args:
        requests: of the call.
        workers: how many there are; a run of equal contexts is at most one share.
    """

    def __init__(self, requests: Sequence[Request], workers: int) -> None:
        self.open = len(requests)
        """Requests that are not answered."""
        self.held: Counter[int] = Counter()
        """Open requests at each worker."""
        self.begun: set[int] = set()
        """Workers that know of the call."""
        self._share = -(-len(requests) // max(1, workers))
        self.waiting: deque[list[Request]] = deque(_in_runs(requests, self._share))
        """Requests that no worker has; those with equal contexts, which are prefilled once, go
        to the same worker."""
        self._requests = {request.trajectory_id: request for request in requests}
        self._ids = np.array(sorted(self._requests), np.int64)
        self._left = np.array([self._requests[key].steps for key in self._ids.tolist()], np.int64)
        """Tokens that each may still get in this call."""
        self._owner = np.full(self.open, -1)
        """−1: nobody has it, because it waits or is answered."""
        self._came: defaultdict[int, list[SegmentColumns]] = defaultdict(list)
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
        self.waiting.extendleft(reversed(_in_runs(rest, self._share)))
        return len(rest)

    def _at(self, keys: Sequence[int]) -> np.ndarray:
        return np.searchsorted(self._ids, keys)


def _in_runs(requests: Sequence[Request], share: int) -> list[list[Request]]:
    """Requests with equal contexts together, the longest first; no run is more than a share."""
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
