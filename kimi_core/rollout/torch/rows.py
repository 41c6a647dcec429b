"""The state of each response that the embedded engine extends."""

from collections.abc import Sequence

import numpy as np

from kimi_core import _C
from kimi_core.rollout.stop import can_complete, is_complete, tail_length
from kimi_core.types import EndReason, Request, Sampling, Segment


class Rows:
    """The rows that are decoded, as parallel arrays; rows 0 .. count − 1 are live."""

    def __init__(self, capacity: int, max_steps: int, sampling: Sampling):
        self.capacity = capacity
        self.count = 0
        self.sampling = sampling
        self.stop = np.array(sorted(sampling.stop_token_ids), np.int64)
        self.tail = tail_length(sampling.stop_strings) if sampling.stop_strings else 0
        """Last tokens of a response that are searched for stop strings."""
        self.detectors = np.full(capacity, None, object)
        self.earlier = np.full(capacity, None, object)
        """The last tokens of the response before this call, where a stop string may begin."""
        self.trajectory_id = np.zeros(capacity, np.int64)
        self.length = np.zeros(capacity, np.int64)
        """Tokens so far, including the newest one, which is not in the cache yet."""
        self.newest = np.zeros(capacity, np.int64)
        self.shift = np.zeros(capacity, np.int64)
        """What images in the context add to the M-RoPE position of what follows."""
        self.made = np.zeros(capacity, np.int64)
        """Tokens that this call has added."""
        self.sent = np.zeros(capacity, np.int64)
        """Number of these tokens that were yielded."""
        self.limit = np.zeros(capacity, np.int64)
        """Tokens that the row may add in this call."""
        self.closes = np.zeros(capacity, bool)
        """Whether the response has then reached its total length limit."""
        self.stopped = np.zeros(capacity, bool)
        self.repeated = np.zeros(capacity, bool)
        # Pages that no row reaches are never touched, so a large budget costs nothing.
        self.token_ids = np.zeros((capacity, max_steps), np.int32)
        self.logprobs = np.zeros((capacity, max_steps), np.float32)
        self.columns = [
            *(self.detectors, self.earlier, self.trajectory_id, self.length, self.newest),
            *(self.made, self.sent, self.limit, self.closes, self.stopped, self.repeated),
            *(self.shift, self.token_ids, self.logprobs),
        ]

    def add(self, requests: list[Request], shifts: Sequence[int] = ()) -> None:
        """Append rows for requests whose contexts were prefilled.

        Args:
            shifts: ``shift`` of each; empty: 0.
        """
        new = slice(self.count, self.count + len(requests))
        self.trajectory_id[new] = [request.trajectory_id for request in requests]
        self.length[new] = [len(request.token_ids) for request in requests]
        self.newest[new] = [request.token_ids[-1] for request in requests]
        self.shift[new] = shifts or 0
        self.made[new] = 0
        self.sent[new] = 0
        self.limit[new] = [request.steps for request in requests]
        self.closes[new] = [request.remaining <= request.budget for request in requests]
        if self.sampling.repeat_window:
            self.detectors[new] = [self._detector(request) for request in requests]
        if self.sampling.stop_strings is not None:
            for row, request in enumerate(requests, self.count):
                self.earlier[row] = request.token_ids[request.prompt_length :][-self.tail :]
        self.count = new.stop

    def append(self, first_row: int, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Add a token to each row from ``first_row`` on; return which rows have ended, ``[n]``."""
        new = slice(first_row, self.count)
        at = np.arange(first_row, self.count), self.made[new]
        self.token_ids[at] = tokens
        self.logprobs[at] = logprobs
        self.newest[new] = tokens
        self.length[new] += 1
        self.made[new] += 1
        self.stopped[new] = (tokens[:, None] == self.stop).any(axis=1)
        self._look_for_stop_strings(first_row, tokens)
        ended = np.zeros(self.count, bool)
        ended[new] = self.stopped[new] | (self.made[new] == self.limit[new])
        if self.sampling.repeat_window:
            self.repeated[new] = _C.push_all(list(self.detectors[new]), tokens.astype(np.int32))
            ended[new] |= self.repeated[new]
        return ended

    def _look_for_stop_strings(self, first_row: int, tokens: np.ndarray) -> None:
        stop = self.sampling.stop_strings
        if stop is None:
            return
        for row, token in enumerate(tokens.tolist(), first_row):
            if can_complete(stop, token) and not self.stopped[row]:
                made = self.token_ids[row, : self.made[row]][-self.tail :]
                tail = np.concatenate([self.earlier[row], made])[-self.tail :]
                self.stopped[row] = is_complete(stop, tail.tolist())

    def due(self) -> np.ndarray:
        """Which rows have enough tokens for a segment that does not end them, bool ``[n]``."""
        every = self.sampling.stream_tokens
        if not every:
            return np.zeros(self.count, bool)
        return self.made[: self.count] - self.sent[: self.count] >= every

    def segment(self, row: int, policy_version: int, *, ended: bool) -> Segment:
        """The tokens of a row that have not been yielded."""
        new = slice(int(self.sent[row]), int(self.made[row]))
        self.sent[row] = self.made[row]
        return Segment(
            trajectory_id=int(self.trajectory_id[row]),
            token_ids=self.token_ids[row, new].copy(),
            logprobs=self.logprobs[row, new].copy(),
            policy_version=policy_version,
            end_reason=self._reason(row) if ended else None,
        )

    def _reason(self, row: int) -> EndReason | None:
        """Why a row ended; None if only its budget is spent."""
        if self.stopped[row]:
            return "stop"
        if self.repeated[row]:
            return "repeat"
        return "length" if self.closes[row] else None

    def keep(self, order: np.ndarray) -> None:
        """Keep only these rows, in this order, int64 ``[m]``."""
        to = np.flatnonzero(order != np.arange(len(order)))
        for column in self.columns:
            column[to] = column[order[to]]
        self.count = len(order)

    def _detector(self, request: Request) -> _C.RepeatDetector:
        detector = _C.RepeatDetector(self.sampling.repeat_window, self.sampling.repeat_count)
        detector.extend(np.ascontiguousarray(request.token_ids[request.prompt_length :], np.int32))
        return detector
