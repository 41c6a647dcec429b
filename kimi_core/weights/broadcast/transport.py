"""Moves the bytes of a slot between processes, in buckets, over ``torch.distributed``.

While bucket i is transferred, the sender prepares bucket i + 1, and the receivers check bucket
i − 1. On the CPU (gloo) buckets are sent from and received into the slot itself, so no byte is
stored twice. On a GPU (NCCL) they pass through device memory, two buckets at a time. Every wait
ends at a ``Deadline``. The NCCL path has never run, because no GPU was available.

gloo listens at the address at which the peers of a group can reach this host.
"""

import socket
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
"""Seconds that an operation may take to end after its time limit has passed."""


class TransferError(RuntimeError):
    """Bytes were not sent or received in time; the message says which bytes and why."""


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock at which a wait ends."""

    at: float
    seconds: float
    """Seconds allowed in total, for messages."""

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(time.monotonic() + seconds, seconds)

    def left(self) -> timedelta:
        """Time left, at least a millisecond, because torch reads 0 as no limit."""
        return timedelta(seconds=max(self.at - time.monotonic(), 0.001))


class Group:
    """Processes that transfer bytes together; rank 0 sends. Point to point is a group of two.

    Leaving the ``with`` block closes the connections, so ranks that wait for this one fail at once.
    """

    def __init__(
        self,
        store: dist.Store,
        prefix: str,
        *,
        rank: int,
        size: int,
        deadline: Deadline,
        host: str,
        backend: Backend = "gloo",
    ) -> None:
        """Connect to the other ranks under ``prefix``, which no earlier group has used.

        Args:
            host: address of this host at which gloo listens.

        Raises:
            TransferError: not all ranks connected before the deadline.
        """
        self.rank = rank
        self.device = torch.device("cpu")
        place = dist.PrefixStore(prefix, store)
        limit = deadline.left()
        self._group: Any  # torch's stub of a backend lacks its collectives.
        try:
            if backend == "gloo":
                self._group = dist.ProcessGroupGloo(place, rank, size, _gloo(host, limit))
            else:
                self.device = torch.device("cuda", torch.cuda.current_device())
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                self._group = dist.ProcessGroupNCCL(place, rank, size, options)
        except RuntimeError as error:
            raise TransferError(
                f"Not all {size} ranks of {prefix} connected within {deadline.seconds:g} s: "
                f"{_first_line(error)}"
            ) from error

    def broadcast(self, piece: torch.Tensor, deadline: Deadline) -> dist.Work:
        """Start to send ``piece`` (on rank 0) or to receive into it.

        Raises:
            TransferError: a rank has disconnected.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = deadline.left()
        options.asyncOp = True
        try:
            return self._group.broadcast([piece], options)
        except RuntimeError as error:
            raise TransferError(f"Cannot start a bucket: {_first_line(error)}") from error

    def close(self) -> None:
        if self.device.type == "cuda":
            self._group.abort()
        del self._group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_address(host: str, port: int) -> str:
    """The address of this host from which packets to ``host`` go out; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        name: str = probe.getsockname()[0]
        return name


def _gloo(host: str, limit: timedelta) -> Any:
    backend: Any = dist.ProcessGroupGloo  # torch's stub of it lacks both.
    options = backend._Options()
    options._timeout = limit
    options._devices = [backend.create_device(hostname=host)]
    return options


@dataclass
class _Bucket:
    """Bytes ``start:end`` of the payload, during their transfer."""

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
    """Send ``payload`` from rank 0 into the payloads of the other ranks; every rank calls this.

    When the function returns or raises, nothing writes to ``payload`` any more.

    Args:
        payload: uint8 ``[n]`` on the CPU, the same n on each rank.
        ready: called with ``start, end`` before the sender reads these bytes.
        landed: called with ``start, end``, in order, when these bytes were received or sent.
        bucket_bytes: at least 1, the same on each rank.

    Raises:
        TransferError: the deadline passed or a rank disconnected.
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
            f"Bytes {bucket.start} to {bucket.end} of {total} were not "
            f"{'sent' if sends else 'received'} within {deadline.seconds:g} s: {_first_line(error)}"
        ) from error


def _settle(flying: deque[_Bucket], deadline: Deadline) -> None:
    """Wait until failed operations have ended, so that no late byte arrives in a slot that is used
    for something else by then. Each ends by the time limit with which it started."""
    limit = max(deadline.at, time.monotonic()) + GRACE_S  # The process may have been suspended.
    while flying and flying[0].staged.device.type == "cpu":
        if flying[0].work.is_completed():
            flying.popleft()
        elif time.monotonic() > limit:
            raise RuntimeError(
                f"A transfer did not end {GRACE_S:g} s after its time limit and may still write to "
                "its slot; end this process before the slot is used again"
            )
        else:
            time.sleep(0.001)
    flying.clear()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
