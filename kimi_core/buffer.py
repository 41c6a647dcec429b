"""The partial-rollout buffer: trajectories that iterations extend until they end (section 2.6.2).

Life of a trajectory: ``begin`` (a prompt and a group are named), ``append`` (the prompt's tokens
with mask 0, then one segment an iteration), ``finish`` (why it ended), ``read`` or ``pack`` for
training, ``evict``. One that is not finished waits for the next iteration; ``unfinished`` lists it.

This is the plain Python buffer: it lives in the process, and ``snapshot`` and ``open`` carry it
over a restart. Nothing here depends on how it is stored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, get_args

import numpy as np

from kimi_core.types import Batch, EndReason, Segment, Trajectory

_COLUMNS = {
    "token_ids": np.int32,
    "logprobs": np.float32,
    "mask": np.uint8,
    "policy_versions": np.int32,
}


@dataclass
class _Slot:
    """One trajectory; each column is the list of its segments."""

    prompt_id: int
    group_id: int
    length: int = 0
    end_reason: EndReason | None = None
    columns: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {name: [] for name in _COLUMNS}
    )

    def column(self, name: str) -> np.ndarray:
        parts = self.columns[name]
        return np.concatenate(parts) if parts else np.empty(0, _COLUMNS[name])


@dataclass(frozen=True)
class BufferStats:
    """What a buffer holds; ``tokens_by_version`` counts sampled tokens by policy version."""

    trajectories: int
    unfinished: int
    tokens: int
    capacity_tokens: int
    tokens_by_version: dict[int, int]


class RolloutBuffer:
    """Trajectories by id. One writer; every array it returns is a copy."""

    def __init__(self, *, capacity_tokens: int, max_trajectories: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._max_trajectories = max_trajectories
        self._slots: dict[int, _Slot] = {}
        self._next_id = 0
        self._tokens = 0
        self.mark = 0
        """A number that the owner leaves, to tell later what the buffer belongs to."""

    @classmethod
    def create(cls, *, capacity_tokens: int, max_trajectories: int) -> Self:
        """An empty buffer.

        Args:
            capacity_tokens: tokens it can hold, prompts included, at least 1.
            max_trajectories: trajectories it can hold, at least 1.

        Raises:
            ValueError: a size is less than 1.
        """
        if capacity_tokens < 1 or max_trajectories < 1:
            raise ValueError(
                f"A buffer of {capacity_tokens} tokens and {max_trajectories} trajectories "
                "holds nothing; both must be at least 1"
            )
        return cls(capacity_tokens=capacity_tokens, max_trajectories=max_trajectories)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The buffer that :meth:`snapshot` wrote to ``path``.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with np.load(path) as saved:
            sizes = saved["sizes"].tolist()
            buffer = cls(capacity_tokens=sizes[0], max_trajectories=sizes[1])
            buffer._next_id = sizes[2]
            columns = {name: saved[name] for name in _COLUMNS}
            start = 0
            for row, reason in zip(saved["slots"].tolist(), saved["reasons"].tolist(), strict=True):
                trajectory_id, prompt_id, group_id, length = row
                slot = _Slot(prompt_id, group_id, length, reason or None)
                for name, column in columns.items():
                    slot.columns[name] = [column[start : start + length].copy()]
                buffer._slots[trajectory_id] = slot
                start += length
            buffer._tokens = start
        return buffer

    def begin(self, prompt_id: int, group_id: int) -> int:
        """Make room for a trajectory and return its id; ids are never used twice.

        Raises:
            ValueError: every slot is taken.
        """
        if len(self._slots) >= self._max_trajectories:
            raise ValueError(
                f"Cannot begin a trajectory: all {self._max_trajectories} are in use; "
                "raise max_trajectories or evict finished ones"
            )
        trajectory_id = self._next_id
        self._next_id += 1
        self._slots[trajectory_id] = _Slot(prompt_id, group_id)
        return trajectory_id

    def append(
        self,
        trajectory_id: int,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        mask: np.ndarray,
        *,
        policy_version: int,
    ) -> int:
        """Add a segment and return the trajectory's new length.

        Args:
            trajectory_id: an unfinished trajectory.
            token_ids: int32 ``[n]``.
            logprobs: float32 ``[n]``, nats, as sampled; 0 where the mask is 0.
            mask: uint8 ``[n]``, 1 for tokens that the policy sampled.
            policy_version: of the weights that sampled them, ``PROMPT_VERSION`` for a prompt.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: it has ended, the lengths differ, a log-prob is not finite, or the buffer is
                full; nothing is appended then.
        """
        slot = self._slot(trajectory_id)
        if slot.end_reason is not None:
            raise ValueError(
                f"Cannot append to trajectory {trajectory_id}: it ended by {slot.end_reason!r}"
            )
        given = {"token_ids": token_ids, "logprobs": logprobs, "mask": mask}
        length = len(token_ids)
        if any(np.shape(column) != (length,) for column in given.values()):
            shapes = {name: np.shape(column) for name, column in given.items()}
            raise ValueError(f"Cannot append columns of different shapes: {shapes}")
        if not np.isfinite(logprobs).all():
            where = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            raise ValueError(
                f"Cannot append to trajectory {trajectory_id}: log-prob {where} of the segment is "
                f"{logprobs[where]}; the engine's weights or logits are broken"
            )
        if self._tokens + length > self._capacity_tokens:
            raise ValueError(
                f"Cannot append {length} tokens: {self._capacity_tokens - self._tokens} free of "
                f"{self._capacity_tokens}; raise capacity_tokens or evict finished trajectories"
            )
        given["policy_versions"] = np.full(length, policy_version)
        for name, column in given.items():
            slot.columns[name].append(np.array(column, dtype=_COLUMNS[name]))
        slot.length += length
        self._tokens += length
        return slot.length

    def append_many(self, segments: Sequence[Segment]) -> None:
        """Append what an engine yielded; a segment with an end reason ends its trajectory.

        Raises: as :meth:`append`.
        """
        for segment in segments:
            self.append(
                segment.trajectory_id,
                segment.token_ids,
                segment.logprobs,
                np.ones(len(segment), np.uint8),
                policy_version=segment.policy_version,
            )
            if segment.end_reason is not None:
                self.finish(segment.trajectory_id, segment.end_reason)

    def set_mark(self, mark: int) -> None:
        """Set :attr:`mark`."""
        self.mark = mark

    def finish(self, trajectory_id: int, reason: EndReason) -> None:
        """Mark a trajectory as ended; it takes no more segments.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: the reason is unknown, or it has ended before.
        """
        slot = self._slot(trajectory_id)
        if reason not in get_args(EndReason):
            raise ValueError(f"Cannot finish by {reason!r}: allowed are {get_args(EndReason)}")
        if slot.end_reason is not None:
            raise ValueError(
                f"Trajectory {trajectory_id} has ended already, by {slot.end_reason!r}"
            )
        slot.end_reason = reason

    def read(self, trajectory_id: int) -> Trajectory:
        """A copy of one trajectory.

        Raises:
            KeyError: there is no such trajectory.
        """
        slot = self._slot(trajectory_id)
        return Trajectory(
            trajectory_id=trajectory_id,
            prompt_id=slot.prompt_id,
            group_id=slot.group_id,
            end_reason=slot.end_reason,
            **{name: slot.column(name) for name in _COLUMNS},
        )

    def pack(self, trajectory_ids: Sequence[int]) -> Batch:
        """Trajectories end to end, in the order given.

        Raises:
            KeyError: there is no such trajectory.
        """
        slots = [self._slot(trajectory_id) for trajectory_id in trajectory_ids]
        packed = {
            name: np.concatenate([np.empty(0, dtype), *(slot.column(name) for slot in slots)])
            for name, dtype in _COLUMNS.items()
        }
        lengths = [slot.length for slot in slots]
        return Batch(cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32), **packed)

    def unfinished(self) -> list[int]:
        """Ids of the trajectories that have not ended, oldest first."""
        return [key for key, slot in self._slots.items() if slot.end_reason is None]

    def finished(self) -> list[int]:
        """Ids of the trajectories that have ended, oldest first."""
        return [key for key, slot in self._slots.items() if slot.end_reason is not None]

    def evict(self, trajectory_ids: Iterable[int]) -> None:
        """Forget trajectories and free their tokens.

        Raises:
            KeyError: there is no such trajectory; nothing is evicted then.
        """
        doomed = list(trajectory_ids)
        for trajectory_id in doomed:
            self._slot(trajectory_id)
        for trajectory_id in doomed:
            self._tokens -= self._slots.pop(trajectory_id).length

    def snapshot(self, path: str | Path) -> None:
        """Write everything to one ``.npz`` file; :meth:`open` gives the same buffer back."""
        slots = [
            (key, slot.prompt_id, slot.group_id, slot.length) for key, slot in self._slots.items()
        ]
        packed = self.pack(list(self._slots))
        with Path(path).open("wb") as file:
            np.savez(
                file,
                sizes=np.array([self._capacity_tokens, self._max_trajectories, self._next_id]),
                slots=np.array(slots, np.int64).reshape(-1, 4),
                reasons=np.array([slot.end_reason or "" for slot in self._slots.values()], "U8"),
                **{name: getattr(packed, name) for name in _COLUMNS},
            )

    def stats(self) -> BufferStats:
        """Counts; cheap enough to take once an iteration."""
        packed = self.pack(list(self._slots))
        versions, counts = np.unique(packed.policy_versions[packed.mask > 0], return_counts=True)
        return BufferStats(
            trajectories=len(self._slots),
            unfinished=len(self.unfinished()),
            tokens=self._tokens,
            capacity_tokens=self._capacity_tokens,
            tokens_by_version=dict(zip(versions.tolist(), counts.tolist(), strict=True)),
        )

    def _slot(self, trajectory_id: int) -> _Slot:
        if trajectory_id not in self._slots:
            raise KeyError(f"No trajectory {trajectory_id}: never begun, or evicted")
        return self._slots[trajectory_id]
