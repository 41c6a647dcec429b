"""A model of the rollout buffer in plain Python, which the C++ buffer is compared with.

It is slow and simple, and keeps everything in lists in the process.
"""

from dataclasses import dataclass, field

import numpy as np

from kimi_core.types import EndReason, Trajectory

COLUMNS = {
    "token_ids": np.int32,
    "logprobs": np.float32,
    "mask": np.uint8,
    "policy_versions": np.int32,
}


@dataclass
class Slot:
    prompt_id: int
    group_id: int
    rows: list[tuple] = field(default_factory=list)
    """Token id, log-prob, mask and policy version of each token."""
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """Start, length and policy version."""
    end_reason: EndReason | None = None
    lease: int = 0


class BufferModel:
    """The model. ``refusal`` gives the error message that an append must raise."""

    def __init__(self, *, pages: int, page_tokens: int, max_trajectories: int) -> None:
        self.pages, self.page_tokens = pages, page_tokens
        self.max_trajectories = max_trajectories
        self.slots: dict[int, Slot] = {}
        self.begun = 0
        self.pages_allocated = 0

    def begin(self, prompt_id: int, group_id: int) -> int:
        self.slots[self.begun] = Slot(prompt_id, group_id)
        self.begun += 1
        return self.begun - 1

    def refusal(self, trajectory_id: int, n: int, lease: int | None) -> str | None:
        if trajectory_id not in self.slots:
            return "No trajectory"
        slot = self.slots[trajectory_id]
        if slot.end_reason:
            return "it ended by"
        if lease is not None and lease != slot.lease:
            return "the newest lease is"
        after = self.pages_of(len(slot.rows) + n, len(slot.segments) + (n > 0))
        if after - self.pages_of(len(slot.rows), len(slot.segments)) > self.pages_free():
            return f"Cannot append {n} tokens"
        return None

    def append(self, trajectory_id, token_ids, logprobs, mask, version, end_reason=None) -> int:
        slot = self.slots[trajectory_id]
        if len(token_ids):
            slot.segments.append((len(slot.rows), len(token_ids), version))
        columns = (column.tolist() for column in (token_ids, logprobs, mask))
        slot.rows.extend((*row, version) for row in zip(*columns, strict=True))
        slot.end_reason = end_reason
        return len(slot.rows)

    def grow(self, pages_free: int) -> None:
        """What one call of the buffer does to the file, given the free pages before the call.

        Free pages of the file are taken first. If they do not suffice, the file grows by a quarter,
        or by what is missing if that is more.
        """
        taken = pages_free - self.pages_free()
        missing = taken - (pages_free - (self.pages - self.pages_allocated))
        if missing > 0:
            more = max(missing, self.pages_allocated // 4)
            self.pages_allocated = min(self.pages, self.pages_allocated + more)

    def evict(self, trajectory_ids: list[int]) -> None:
        for trajectory_id in trajectory_ids:
            self.slots.pop(trajectory_id, None)  # An id may occur twice.

    def read(self, trajectory_id: int) -> Trajectory:
        slot = self.slots[trajectory_id]
        columns = list(zip(*slot.rows, strict=True)) or [()] * 4
        arrays = [np.array(c, t) for c, t in zip(columns, COLUMNS.values(), strict=True)]
        return Trajectory(trajectory_id, slot.prompt_id, slot.group_id, *arrays, slot.end_reason)

    def pages_of(self, tokens: int, segments: int) -> int:
        """Pages that a trajectory takes.

        A page has 9 bytes for each of its ``page_tokens`` tokens, and holds tokens, 4-byte page
        numbers or 16-byte records. A slot itself lists 32 pages of tokens, 12 records, and 12 pages
        of further records.
        """
        page_bytes = 9 * self.page_tokens
        token_pages = -(-tokens // self.page_tokens)
        record_pages = -(-max(0, segments - 12) // (page_bytes // 16))
        listing = [-(-max(0, token_pages - 32) // (page_bytes // 4))]
        listing += [-(-max(0, record_pages - 12) // (page_bytes // 4))]
        return token_pages + record_pages + sum(listing)

    def pages_free(self) -> int:
        taken = (self.pages_of(len(s.rows), len(s.segments)) for s in self.slots.values())
        return self.pages - sum(taken)
