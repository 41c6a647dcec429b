"""Moving the bytes of a slot between processes: buckets over ``torch.distributed``, none of them
trusted before its checksum.

While bucket i is on the wire, the sender makes bucket i + 1 ready and the receivers check bucket
i − 1. On the CPU (gloo) buckets are sent from and received into the slot itself, so that nothing is
held twice; on a GPU (NCCL) they pass through device memory, two buckets at a time. Every wait ends
at a ``Deadline``. The NCCL path follows the same plan but has never run: no GPU was at hand.

gloo binds the network interface that ``GLOO_SOCKET_IFNAME`` names, or that of the host's name.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

Backend = Literal["gloo", "nccl"]
BUCKET_BYTES = 64 << 20
GRACE_S = 5.0
"""How long after its own time limit an operation may still take to say that it is over."""


class TransferError(RuntimeError):
    """Bytes did not arrive, or did not leave, in time; says which and why."""


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock that a wait does not go beyond."""

    at: float
    seconds: float
    """What was allowed in all, for messages."""

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(time.monotonic() + seconds, seconds)

    def left(self) -> timedelta:
        """Time left, at least a millisecond: torch reads 0 as no limit."""
        return timedelta(seconds=max(self.at - time.monotonic(), 0.001))


class Group:
    """Processes that move bytes together; rank 0 sends. Point to point is a group of two.

    Leaving the ``with`` block hangs up: a rank that waits on this one fails at once then, not only
    at its deadline.
    """

    def __init__(
        self,
        store: dist.Store,
        prefix: str,
        *,
        rank: int,
        size: int,
        deadline: Deadline,
        backend: Backend = "gloo",
    ) -> None:
        """Meet the other ranks under ``prefix``, which no earlier group has used.

        Raises:
            TransferError: not all of them came before the deadline.
        """
        self.rank = rank
        self.device = torch.device("cpu")
        place = dist.PrefixStore(prefix, store)
        limit = deadline.left()
        self._group: Any  # torch's stub of a backend lacks its collectives.
        try:
            if backend == "gloo":
                self._group = dist.ProcessGroupGloo(place, rank, size, limit)
            else:
                self.device = torch.device("cuda", torch.cuda.current_device())
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                self._group = dist.ProcessGroupNCCL(place, rank, size, options)
        except RuntimeError as error:
            raise TransferError(
                f"The {size} ranks of {prefix} did not all meet within {deadline.seconds:g} s: "
                f"{_first_line(error)}"
            ) from error

    def broadcast(self, piece: torch.Tensor, deadline: Deadline) -> dist.Work:
        """Start to send ``piece`` (on rank 0) or to receive into it.

        Raises:
            TransferError: a rank has hung up already.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = deadline.left()
        options.asyncOp = True
        try:
            return self._group.broadcast([piece], options)
        except RuntimeError as error:
            raise TransferError(f"A bucket could not begin: {_first_line(error)}") from error

    def close(self) -> None:
        if self.device.type == "cuda":
            self._group.abort()
        del self._group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Bucket:
    """Bytes ``start:end`` of the payload, on their way."""

    start: int
    end: int
    staged: torch.Tensor
    work: dist.Work


def move(
    group: Group,
    payload: torch.Tensor,
    deadline: Deadline,
    *,
    ready: Callable[[int, int], None] | None = None,
    landed: Callable[[int, int], None] | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Send ``payload`` from rank 0 into the payloads of the other ranks; all of them call this.

    On return, and also when it raises, nothing writes to ``payload`` any more.

    Args:
        payload: uint8 ``[n]`` on the CPU, the same n on each rank.
        ready: called with ``start, end`` before the sender reads these bytes.
        landed: called with ``start, end``, in order, when they have arrived or have left.
        bucket_bytes: at least 1, the same on each rank.

    Raises:
        TransferError: the deadline passed or a rank hung up.
    """
    flying: deque[_Bucket] = deque()

    def land() -> None:
        bucket = flying[0]
        _wait(bucket, len(payload), deadline, sends=group.rank == 0)
        if group.device.type == "cuda" and group.rank > 0:
            payload[bucket.start : bucket.end].copy_(bucket.staged)
        flying.popleft()
        if landed:
            landed(bucket.start, bucket.end)

    try:
        for start in range(0, len(payload), bucket_bytes):
            end = min(start + bucket_bytes, len(payload))
            if ready:
                ready(start, end)
            staged = payload[start:end]
            if group.device.type == "cuda":
                staged = staged.to(group.device) if group.rank == 0 else _room(staged, group)
            flying.append(_Bucket(start, end, staged, group.broadcast(staged, deadline)))
            if len(flying) > 1:
                land()
        while flying:
            land()
    finally:
        _settle(flying, deadline)


def _room(piece: torch.Tensor, group: Group) -> torch.Tensor:
    return torch.empty(len(piece), dtype=torch.uint8, device=group.device)


def _wait(bucket: _Bucket, total: int, deadline: Deadline, *, sends: bool) -> None:
    try:
        bucket.work.wait(deadline.left())
    except RuntimeError as error:
        raise TransferError(
            f"Bytes {bucket.start} to {bucket.end} of {total} did not "
            f"{'leave' if sends else 'arrive'} within {deadline.seconds:g} s: {_first_line(error)}"
        ) from error


def _settle(flying: deque[_Bucket], deadline: Deadline) -> None:
    """Wait until operations that failed are over, so that no late byte lands in a slot that serves
    something else by then. Each has a time limit of its own, the deadline when it began."""
    limit = max(deadline.at, time.monotonic()) + GRACE_S  # The process may have been frozen.
    while flying and flying[0].staged.device.type == "cpu":
        if flying[0].work.is_completed():
            flying.popleft()
        elif time.monotonic() > limit:
            raise RuntimeError(
                f"A transfer outlives its time limit by {GRACE_S:g} s and may still write to its "
                "slot: end this process before the slot is used again"
            )
        else:
            time.sleep(0.001)
    flying.clear()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
