"""A response that an engine in another process extends: where it ends and how it is cut."""

from collections.abc import Sequence

import numpy as np

from kimi_core import _C
from kimi_core.rollout.stop import first_stop, tail_length
from kimi_core.types import EndReason, Request, Sampling, Segment


class Response:
    """The tokens received for one request, cut into the same segments as the embedded engine's."""

    def __init__(self, request: Request, sampling: Sampling):
        self.request = request
        self.stop = sampling.stop_token_ids
        self.stop_strings = sampling.stop_strings
        self.every = sampling.stream_tokens
        self.token_ids: list[int] = []
        """Tokens that this call has added."""
        self.logprobs: list[float] = []
        self.sent = 0
        """Number of these tokens that are in segments."""
        self.ended = False
        self.end_reason: EndReason | None = None
        self.detector = None
        if sampling.repeat_window:
            self.detector = _C.RepeatDetector(sampling.repeat_window, sampling.repeat_count)
            earlier = request.token_ids[request.prompt_length :]
            self.detector.extend(np.ascontiguousarray(earlier, np.int32))

    @property
    def context(self) -> np.ndarray:
        """All tokens before the next one, int32 ``[n]``."""
        return np.concatenate([self.request.token_ids, self.token_ids]).astype(np.int32)

    @property
    def left(self) -> int:
        """Most tokens that may still come."""
        return self.request.steps - len(self.token_ids)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add tokens up to the end of the response; drop the rest."""
        stop = self._first_stop(token_ids)
        count = min(self.left if stop is None else stop + 1, self.left, len(token_ids))
        repeated = False
        if self.detector is not None:
            at = self.detector.extend(np.array(token_ids[:count], np.int32))
            if at is not None and at >= 0:
                count, repeated = at + 1, True
        self.token_ids += token_ids[:count]
        self.logprobs += logprobs[:count]
        if count and stop == count - 1:
            self.end_reason = "stop"
        elif repeated:
            self.end_reason = "repeat"
        elif not self.left and self.request.remaining <= self.request.budget:
            self.end_reason = "length"
        self.ended = self.end_reason is not None or not self.left

    def _first_stop(self, token_ids: Sequence[int]) -> int | None:
        """Index of the first token that ends the response, by its id or by its text."""
        found = [at for at, token in enumerate(token_ids) if token in self.stop][:1]
        if self.stop_strings is not None:
            most = tail_length(self.stop_strings)
            before_call = self.request.token_ids[self.request.prompt_length :][-most:].tolist()
            earlier = (before_call + self.token_ids[-most:])[-most:]
            at = first_stop(self.stop_strings, token_ids, earlier)
            found += [] if at is None else [at]
        return min(found, default=None)

    def ready(self, policy_version: int) -> list[Segment]:
        """Complete segments that were not handed over yet."""
        segments = []
        while self.every and len(self.token_ids) - self.sent > self.every:
            segments.append(self._segment(self.every, policy_version, None))
        unsent = len(self.token_ids) - self.sent
        if unsent and (self.ended or unsent == self.every):
            segments.append(self._segment(unsent, policy_version, self.end_reason))
        return segments

    def _segment(self, length: int, policy_version: int, end_reason: EndReason | None) -> Segment:
        new = slice(self.sent, self.sent + length)
        self.sent += length
        return Segment(
            trajectory_id=self.request.trajectory_id,
            token_ids=np.array(self.token_ids[new], np.int32),
            logprobs=np.array(self.logprobs[new], np.float32),
            policy_version=policy_version,
            end_reason=end_reason,
        )
