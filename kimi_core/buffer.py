"""The partial-rollout buffer: trajectories that iterations extend until they end (section 2.6.2).

The life of a trajectory:

1. ``begin`` opens it for a prompt and a group.
2. ``append`` adds the prompt's tokens with mask 0, then segments as the policy samples them.
3. ``finish``, or the last ``append``, says why it ended. ``unfinished`` lists those that have not
   ended and that the next iteration extends.
4. ``read`` and ``pack`` give its tokens to the reward and to the trainer.
5. ``evict`` removes it.

The buffer is a file, mapped into memory. It grows as trajectories do; ``append`` uses the space of
evicted ones first. An appended segment survives the death of the process once ``append`` has
returned, and any number of other processes may read the file meanwhile. ``docs/buffer_format.md``
describes the format and why it survives. The implementation is in C++ (``csrc/buffer``).

    python -m kimi_core.buffer runs/think/buffer.bin      # print what a buffer file holds
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from kimi_core import _C
from kimi_core.types import PROMPT_VERSION, Batch, EndReason, Trajectory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BufferStats:
    """Counts of a buffer. ``tokens_by_version`` counts sampled tokens by policy version."""

    trajectories: int
    unfinished: int
    tokens: int
    segments: int
    pages: int
    """The most that the file may have."""
    pages_free: int
    """Of ``pages``, those that no trajectory takes, in the file or not yet."""
    pages_allocated: int
    """In the file now, in use or free."""
    page_tokens: int
    max_trajectories: int
    tokens_by_version: dict[int, int]

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all pages hold. A trajectory takes whole pages; see ``tokens_taken``."""
        return self.pages * self.page_tokens


@dataclass(frozen=True)
class TrajectoryInfo:
    """A trajectory without its tokens."""

    trajectory_id: int
    prompt_id: int
    group_id: int
    length: int
    """Tokens, including those of the prompt."""
    end_reason: EndReason | None


@dataclass(frozen=True)
class DeviceBatch:
    """A ``Batch`` whose arrays are torch tensors on one device, with the same shapes and dtypes."""

    token_ids: "torch.Tensor"
    logprobs: "torch.Tensor"
    mask: "torch.Tensor"
    policy_versions: "torch.Tensor"
    cu_seqlens: "torch.Tensor"


class RolloutBuffer(_C.RolloutBuffer):
    """Trajectories by id, in a file. One thread of one process writes; any number may read.

    ``begin``, ``append_many``, ``finish``, ``resume``, ``evict``, ``flush`` and ``snapshot`` are
    inherited from ``kimi_core._C.RolloutBuffer`` and documented there. Columns are numpy arrays, or
    torch tensors on the CPU. Results are numpy arrays unless ``pack`` is given a device.
    """

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        capacity_tokens: int,
        max_trajectories: int,
        page_tokens: int = 256,
    ) -> Self:
        """Create an empty buffer and open it for writing.

        The file has no page at first. It grows up to ``file_bytes(capacity_tokens, ...)`` as
        trajectories are appended, and never gets shorter.

        Args:
            path: a new file.
            capacity_tokens: tokens that fit, including prompts, at least 1. ``tokens_taken`` gives
                the part that one trajectory takes.
            max_trajectories: trajectories that fit, at least 1.
            page_tokens: tokens in a page, a multiple of 8 from 8 to 65536.

        Raises:
            ValueError: a size is out of range.
            FileExistsError: the file exists.
            OSError: the disk is full.
        """
        cls._create(str(path), capacity_tokens, max_trajectories, page_tokens)
        try:
            return cls.open(path)
        except OSError:
            Path(path).unlink()  # It may have taken the rest of the disk.
            raise

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = False) -> Self:
        """Open a buffer, as its writer or to read it while another process writes.

        The writer compares every checksum and cuts a damaged trajectory to its longest intact
        prefix, from which it continues. ``recovery`` lists the cuts. There are none unless the
        machine went down or the file was damaged.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a buffer, is cut off, has a damaged header or a newer
                format, or is open for writing in another process.
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
        """Append one segment and return the trajectory's new length, in tokens.

        After this has returned, the segment survives the death of the process. A process that dies
        before may leave the segment as a whole or not at all.

        Args:
            trajectory_id: an unfinished trajectory.
            token_ids: int32 ``[n]``.
            logprobs: float32 ``[n]``, nats, as sampled; 0 where the mask is 0.
            mask: uint8 ``[n]``, 1 for tokens that the policy sampled.
            policy_version: version of the weights that sampled them; ``PROMPT_VERSION`` for a
                prompt.
            end_reason: why the trajectory ends with this segment; None leaves it open.
            lease: the result of ``resume``. An older lease than the newest is refused; None is not
                checked.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: it has ended, the lengths differ, a log-prob is not finite, the lease is not
                the newest, or the buffer is full. Nothing is appended then.
            OSError: the file must grow, and the disk is full. Nothing is appended then.
            TypeError: a column does not convert without loss.
        """
        return self._append(
            trajectory_id, token_ids, logprobs, mask, policy_version, end_reason, lease
        )

    def read(self, trajectory_id: int) -> Trajectory:
        """Return a copy of one trajectory, after comparing its checksums.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: the trajectory is damaged.
        """
        prompt_id, group_id, token_ids, logprobs, mask, versions, reason = self._read(trajectory_id)
        return Trajectory(
            trajectory_id, prompt_id, group_id, token_ids, logprobs, mask, versions, reason
        )

    @overload
    def pack(self, trajectory_ids: Sequence[int], *, out: Batch | None = None) -> Batch: ...

    @overload
    def pack(
        self, trajectory_ids: Sequence[int], *, device: "torch.device | str"
    ) -> DeviceBatch: ...

    def pack(
        self,
        trajectory_ids: Sequence[int],
        *,
        out: Batch | None = None,
        device: "torch.device | str | None" = None,
    ) -> Batch | DeviceBatch:
        """Copy trajectories end to end, in the order given, after comparing their checksums.

        With a CUDA device, whole pages go to the device in one transfer and a kernel gathers them
        there. If the package was built without CUDA, the columns are packed on the host and copied.

        Args:
            trajectory_ids: any number of ids; an id may occur more than once.
            out: arrays, or torch tensors on the CPU, to pack into, at least as long as needed. The
                result is their beginnings. None allocates new arrays.
            device: where the result is needed as torch tensors; None returns numpy arrays.

        Raises:
            KeyError: there is no such trajectory.
            ValueError: ``out`` is too short, a trajectory is damaged, or both ``out`` and
                ``device`` are given.
            TypeError: an array of ``out`` has another dtype or is not contiguous.
        """
        ids = np.asarray(trajectory_ids, np.int64)
        if device is not None:
            if out is not None:
                raise ValueError(f"out was given with device={device!r}: give only one of them")
            return self._pack_on(device, ids)
        names = ("token_ids", "logprobs", "mask", "policy_versions", "cu_seqlens")
        given: Any = None
        if out is not None:
            given = tuple(np.asarray(getattr(out, name)) for name in names)
        token_ids, logprobs, mask, versions, cu_seqlens, n = self._pack(ids, given)
        ends = cu_seqlens[: len(ids) + 1]
        return Batch(token_ids[:n], logprobs[:n], mask[:n], versions[:n], ends)

    def _pack_on(self, name: "torch.device | str", ids: np.ndarray) -> DeviceBatch:
        import torch  # Here, because it takes seconds and most readers of a file do not need it.

        device = torch.device(name)
        if device.type == "cuda" and _C.has_device_code():
            with torch.cuda.device(device):
                return self._gather_on(device, ids)
        *columns, _ = self._pack(ids)
        return DeviceBatch(*(torch.from_numpy(column).to(device) for column in columns))

    def _gather_on(self, device: "torch.device", ids: np.ndarray) -> DeviceBatch:
        """Send whole pages to the device and gather them there; on the CPU, gather on the host."""
        import torch

        is_cuda = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if is_cuda else None
        staged: list[torch.Tensor] = []

        def allocate(size: int) -> np.ndarray:  # Pinned, so that the copy runs at full speed.
            staged.append(torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda))
            return staged[0].numpy()

        _, *arrays = self._stage(ids, allocate)
        first_pages, cu_seqlens, versions, lengths = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        pages = staged[0].to(device, non_blocking=True)
        tokens = int(arrays[1][-1])
        token_ids, logprobs, mask = (
            torch.empty(tokens, dtype=dtype, device=device)
            for dtype in (torch.int32, torch.float32, torch.uint8)
        )
        _C.gather_pages(
            pages=pages.data_ptr(),
            page_tokens=self.page_tokens,
            first_pages=first_pages.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(),
            sequences=len(ids),
            tokens=tokens,
            token_ids=token_ids.data_ptr(),
            logprobs=logprobs.data_ptr(),
            mask=mask.data_ptr(),
            stream=stream,
        )
        policy_versions = torch.repeat_interleave(versions, lengths, output_size=tokens)
        return DeviceBatch(token_ids, logprobs, mask, policy_versions, cu_seqlens)

    def trajectories(self) -> list[TrajectoryInfo]:
        """All trajectories without their tokens, oldest first. Reads no token."""
        return [TrajectoryInfo(*row) for row in self._scan()]

    def unfinished(self) -> list[int]:
        """Ids of the trajectories that have not ended, oldest first."""
        return [info.trajectory_id for info in self.trajectories() if info.end_reason is None]

    def finished(self) -> list[int]:
        """Ids of the trajectories that have ended, oldest first."""
        return [info.trajectory_id for info in self.trajectories() if info.end_reason is not None]

    def stats(self) -> BufferStats:
        """Count what the buffer holds, from the slots and segment records. Reads no token."""
        return BufferStats(**self._stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(buffer: RolloutBuffer) -> Iterator[str]:
    """Describe everything that a buffer holds, line by line, after comparing every checksum."""
    stats = buffer.stats()
    yield f"{buffer.path}: mark {buffer.mark}"
    yield (
        f"  {stats.trajectories} of {stats.max_trajectories} trajectories, {stats.unfinished} "
        f"unfinished; {stats.tokens} tokens in {stats.segments} segments"
    )
    yield (
        f"  {stats.pages_free} of {stats.pages} pages of {stats.page_tokens} tokens free; the file "
        f"has {stats.pages_allocated} of them so far"
    )
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
    """Print what a buffer file holds.

    Returns the exit status: 0 if all of it is intact, 1 if some is damaged, 2 if it cannot be read.
    """
    if len(arguments) != 1:
        print("usage: kimi buffer PATH", file=sys.stderr)
        return 2
    status = 0
    try:
        with RolloutBuffer.open(arguments[0], readonly=True) as buffer:
            for line in describe(buffer):
                print(line)
                status = max(status, int("DAMAGED" in line))
    except BrokenPipeError:  # The reader, such as `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
