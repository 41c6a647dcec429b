"""The rollout buffer in plain Python, slow and obviously right: the twin that the C++ one is tested
against. It lives in the process and keeps everything in lists."""

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
    """Errors are told apart by name: ``refusal`` says what an append would be refused for."""

    def __init__(self, *, pages: int, page_tokens: int, max_trajectories: int) -> None:
        self.pages, self.page_tokens = pages, page_tokens
        self.max_trajectories = max_trajectories
        self.slots: dict[int, Slot] = {}
        self.begun = 0

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
            return "is under lease"
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

    def evict(self, trajectory_ids, stale_before=None, free_tokens=None) -> list[int]:
        gone = []

        def forget(trajectory_id: int) -> None:
            if self.slots.pop(trajectory_id, None):
                gone.append(trajectory_id)

        for trajectory_id in trajectory_ids:
            forget(trajectory_id)
        for trajectory_id, slot in list(self.slots.items()):
            if stale_before is not None and slot.segments and slot.segments[-1][2] < stale_before:
                forget(trajectory_id)
        for trajectory_id in list(self.slots):
            if free_tokens is not None and self.pages_free() * self.page_tokens < free_tokens:
                forget(trajectory_id)
        return gone

    def read(self, trajectory_id: int) -> Trajectory:
        slot = self.slots[trajectory_id]
        columns = list(zip(*slot.rows, strict=True)) or [()] * 4
        arrays = [np.array(c, t) for c, t in zip(columns, COLUMNS.values(), strict=True)]
        return Trajectory(trajectory_id, slot.prompt_id, slot.group_id, *arrays, slot.end_reason)

    def pages_of(self, tokens: int, segments: int) -> int:
        """A page holds so many tokens, 4-byte page numbers or 16-byte records in 9 bytes a token; a
        slot lists 32 pages and 12 records itself, and 12 pages of further records."""
        page_bytes = 9 * self.page_tokens
        token_pages = -(-tokens // self.page_tokens)
        record_pages = -(-max(0, segments - 12) // (page_bytes // 16))
        listing = [-(-max(0, token_pages - 32) // (page_bytes // 4))]
        listing += [-(-max(0, record_pages - 12) // (page_bytes // 4))]
        return token_pages + record_pages + sum(listing)

    def pages_free(self) -> int:
        taken = (self.pages_of(len(s.rows), len(s.segments)) for s in self.slots.values())
        return self.pages - sum(taken)
