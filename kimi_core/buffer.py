"""The partial-rollout buffer: trajectories that iterations extend until they end (section 2.6.2).

Life of a trajectory: ``begin`` (a prompt and a group are named), ``append`` (the prompt's tokens
with mask 0, then segments as they are sampled), ``finish`` (why it ended), ``read`` or ``pack`` for
training, ``evict``. One that is not finished waits for the next iteration; ``unfinished`` lists it.

The buffer is a file, mapped into memory: what ``append`` returned from is there when the process
is killed, and any number of other processes may read it meanwhile. ``docs/buffer_format.md`` has
the format and why it survives. The work is done in C++ (``csrc/buffer``); this is its Python face.

    python -m kimi_core.buffer runs/think/buffer.bin      # what a buffer file holds
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from kimi_core import _C
from kimi_core.types import PROMPT_VERSION, Batch, EndReason, Trajectory

Durability = Literal["process", "machine"]


@dataclass(frozen=True)
class BufferStats:
    """What a buffer holds; ``tokens_by_version`` counts sampled tokens by policy version."""

    trajectories: int
    unfinished: int
    tokens: int
    segments: int
    pages: int
    pages_free: int
    page_tokens: int
    max_trajectories: int
    tokens_by_version: dict[int, int]

    @property
    def capacity_tokens(self) -> int:
        """Tokens in all its pages; a trajectory takes whole pages (``tokens_taken``)."""
        return self.pages * self.page_tokens


@dataclass(frozen=True)
class TrajectoryInfo:
    """A trajectory without its tokens."""

    trajectory_id: int
    prompt_id: int
    group_id: int
    length: int
    """Tokens, the prompt's included."""
    end_reason: EndReason | None


class RolloutBuffer(_C.RolloutBuffer):
    """Trajectories by id, in a file. One writer process with one thread at a time; any readers.

    ``begin``, ``append_many``, ``finish``, ``resume``, ``evict``, ``view``, ``flush``, ``snapshot``
    and the prompts' counts are those of ``kimi_core._C.RolloutBuffer``, documented there. Arrays go
    in as numpy arrays or torch tensors on the CPU, and come out as numpy arrays, whose memory
    ``torch.from_numpy`` shares.
    """

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        capacity_tokens: int,
        max_trajectories: int,
        page_tokens: int = 256,
        durability: Durability = "process",
        sync_interval_ms: int = 1000,
        max_prompts: int = 0,
    ) -> Self:
        """Make an empty buffer and open it for writing. All its disk space is taken at once.

        Args:
            path: where no file is yet.
            capacity_tokens: room for tokens, prompts included, at least 1; ``tokens_taken`` tells
                what a trajectory takes of it.
            max_trajectories: trajectories it can hold, at least 1.
            page_tokens: tokens a page, a multiple of 8.
            durability: what an append survives: the death of the process, or also that of the
                machine, if it came at least ``sync_interval_ms`` before that, or before a
                ``flush``.
            sync_interval_ms: at the machine level, how often the file is forced to disk.
            max_prompts: prompts that ``record_result`` and ``draw`` know, numbered from 0.

        Raises:
            ValueError: a size is out of range.
            FileExistsError: there is a file already.
            OSError: there is no room on the disk.
        """
        if durability not in ("process", "machine"):
            raise ValueError(f"durability = {durability!r}: allowed are 'process' and 'machine'")
        if durability == "machine" and sync_interval_ms < 1:
            raise ValueError(f"sync_interval_ms = {sync_interval_ms}: it must be at least 1")
        cls._create(
            str(path),
            capacity_tokens=capacity_tokens,
            max_trajectories=max_trajectories,
            page_tokens=page_tokens,
            max_prompts=max_prompts,
            sync_interval_ms=sync_interval_ms if durability == "machine" else 0,
        )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = False) -> Self:
        """Open a buffer, for reading beside its writer or as the writer.

        The writer checks every checksum: a trajectory that fails is cut to its longest sound
        prefix and goes on from there. ``recovery`` says what was cut; it is empty unless the
        machine went down or the file was damaged.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no buffer, damaged in its header, cut off, or of a newer format; or
                another process has it open for writing.
        """
        return cls(str(path), readonly=readonly)

    def append(
        self,
        trajectory_id: int,
        token_ids: Any,
        logprobs: Any,
        mask: Any,
        *,
        policy_version: int,
        end_reason: EndReason | None = None,
        lease: int | None = None,
    ) -> int:
        """Add a segment and return the trajectory's new length.

        On return the segment survives the death of this process. A process that dies before leaves
        nothing of it.

        Args:
            trajectory_id: an unfinished trajectory.
            token_ids: int32 ``[n]``.
            logprobs: float32 ``[n]``, nats, as sampled; 0 where the mask is 0.
            mask: uint8 ``[n]``, 1 for tokens that the policy sampled.
            policy_version: of the weights that sampled them, ``PROMPT_VERSION`` for a prompt.
            end_reason: ends the trajectory in the same instant; as ``finish``.
            lease: what ``resume`` returned; a newer lease makes it void. None is not checked.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: it has ended, the lengths differ, a log-prob is not finite, the lease is
                void, or the buffer is full; nothing is appended then.
            TypeError: a column does not convert without loss.
        """
        return self._append(
            trajectory_id, token_ids, logprobs, mask, policy_version, end_reason, lease
        )

    def read(self, trajectory_id: int) -> Trajectory:
        """A copy of one trajectory.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: the file is damaged there.
        """
        prompt_id, group_id, token_ids, logprobs, mask, versions, reason = self._read(trajectory_id)
        return Trajectory(
            trajectory_id, prompt_id, group_id, token_ids, logprobs, mask, versions, reason
        )

    def pack(self, trajectory_ids: Sequence[int], *, out: Batch | None = None) -> Batch:
        """Trajectories end to end, in the order given.

        Args:
            trajectory_ids: any number, also none; one may stand more than once.
            out: arrays, or torch tensors on the CPU, to pack into, at least as long as needed;
                what comes back are their beginnings. New arrays are made otherwise.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: ``out`` is too short, or the file is damaged.
            TypeError: an array of ``out`` has another dtype or is not contiguous.
        """
        ids = np.asarray(trajectory_ids, np.int64)
        names = ("token_ids", "logprobs", "mask", "policy_versions", "cu_seqlens")
        given: Any = None
        if out is not None:
            given = tuple(np.asarray(getattr(out, name)) for name in names)
        token_ids, logprobs, mask, versions, cu_seqlens, n = self._pack(ids, given)
        ends = cu_seqlens[: len(ids) + 1]
        return Batch(token_ids[:n], logprobs[:n], mask[:n], versions[:n], ends)

    def pack_micro_batches(
        self, trajectory_ids: Sequence[int], *, max_tokens: int
    ) -> list[tuple[list[int], Batch]]:
        """As few batches of at most ``max_tokens`` as can be found, of about the same size.

        Returns each batch's trajectory ids, in the order given, with the batch.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: one trajectory alone is longer.
        """
        length_of = {info.trajectory_id: info.length for info in self.trajectories()}
        if missing := [key for key in trajectory_ids if key not in length_of]:
            raise KeyError(f"No trajectory {missing[0]}: never begun, or evicted")
        split = _C.balance([length_of[key] for key in trajectory_ids], max_tokens)
        batches = [[trajectory_ids[index] for index in indices] for indices in split]
        return [(ids, self.pack(ids)) for ids in batches]

    def trajectories(self) -> list[TrajectoryInfo]:
        """Every trajectory without its tokens, oldest first."""
        return [TrajectoryInfo(*row) for row in self._scan()]

    def unfinished(self) -> list[int]:
        """Ids of the trajectories that have not ended, oldest first."""
        return [info.trajectory_id for info in self.trajectories() if info.end_reason is None]

    def finished(self) -> list[int]:
        """Ids of the trajectories that have ended, oldest first."""
        return [info.trajectory_id for info in self.trajectories() if info.end_reason is not None]

    def stats(self) -> BufferStats:
        """Counts; cheap enough to take once an iteration."""
        return BufferStats(**self._stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(buffer: RolloutBuffer) -> Iterator[str]:
    """Lines about everything that a buffer holds; every token is read and its checksum compared."""
    stats = buffer.stats()
    yield f"{buffer.path}: mark {buffer.mark}"
    yield (
        f"  {stats.trajectories} of {stats.max_trajectories} trajectories, {stats.unfinished} "
        f"unfinished; {stats.tokens} tokens in {stats.segments} segments"
    )
    yield f"  {stats.pages_free} of {stats.pages} pages of {stats.page_tokens} tokens free"
    newest = max(stats.tokens_by_version, default=0)
    for version, tokens in sorted(stats.tokens_by_version.items(), reverse=True):
        yield f"  policy version {version}, age {newest - version}: {tokens} tokens"
    for info in buffer.trajectories():
        lengths: dict[int, list[str]] = {}
        try:
            for _, length, version in buffer.segments(info.trajectory_id):
                lengths.setdefault(version, []).append(str(length))
            buffer.read(info.trajectory_id)
            state = "checksums ok"
        except KeyError:
            state = "evicted meanwhile"
        except ValueError as error:
            state = f"DAMAGED: {error}"
        names = {v: "prompt" if v == PROMPT_VERSION else f"version {v}" for v in lengths}
        parts = ", ".join(f"{names[v]}: {' + '.join(lengths[v])}" for v in lengths)
        yield (
            f"  trajectory {info.trajectory_id}, prompt {info.prompt_id}, group {info.group_id}: "
            f"{info.length} tokens ({parts}), {info.end_reason or 'open'}; {state}"
        )


def main(arguments: Sequence[str]) -> int:
    """Print what a buffer file holds. 0: all sound; 1: some of it damaged; 2: it cannot be read."""
    if len(arguments) != 1:
        print("usage: kimi buffer PATH", file=sys.stderr)
        return 2
    status = 0
    try:
        with RolloutBuffer.open(arguments[0], readonly=True) as buffer:
            for line in describe(buffer):
                print(line)
                status = max(status, int("DAMAGED" in line))
    except BrokenPipeError:  # `| head` has seen enough; nor can the interpreter write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
