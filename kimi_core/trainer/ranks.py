"""The ranks that train one model together: who they are, what they agree on, who does what.

Rank 0 is the process of the run. It holds loop, buffer, engine and rewards. The other ranks follow:

1. All ranks meet at a store of ``torch.distributed``, under the number of their generation: ranks
   that are left over from an earlier start never meet the new ones.
2. A method that is marked ``on_all_ranks`` and called on rank 0 puts an order into the store. The
   followers wait for orders without a time limit, because a rollout may take hours.
3. Each rank gets the arguments, of a ``PerRank`` its own part, and calls the method. From here on
   each collective has the time limit ``trainer.ranks_timeout_s``.
4. A follower ends when rank 0 is gone: the store is rank 0's. A follower that is gone ends the
   method on rank 0 with ``RankFailed``.

``Ranks()`` is one process. Its methods return what they are given, and no process group exists.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from kimi_core import _C

POLL_S = 60.0
"""Seconds of one wait for an order. The next wait follows, unless rank 0 is gone."""

NOTICE_S = 2.0
"""Seconds that a process may take to be seen as ended after it broke a connection."""

END = "end"
"""In place of an order: the followers end."""


class RankFailed(RuntimeError):
    """A rank of the trainer ended or did not answer in time; ``what`` names it if it ended.

    The last saved state is intact, and ``--resume`` continues from it, which the message says.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}\nThe last saved state is intact: continue with --resume")
        self.what = what


class PerRank(list[Any]):
    """In place of an argument of a method ``on_all_ranks``: a value for each rank."""


class Followers(Protocol):
    """The processes of the ranks above 0, as rank 0 sees them."""

    def ended(self) -> str:
        """Which of them has ended, and how; empty: all run."""
        ...

    def close(self) -> None:
        """End them. Safe to call twice."""
        ...


class Ranks:
    """The ranks of a trainer, as one of them sees them.

    Args:
        rank: this process; 0 gives the orders.
        size: number of processes. With more than 1, ``torch.distributed`` has been initialised.
        copies: ranks that compute the same sequences together, by tensor and context parallelism.
            They have adjacent numbers.
        store: where the orders are; None with one process.
        followers: on rank 0, the processes of the other ranks. None: nobody follows, and each rank
            calls the same methods by itself.
        far: the ranks that cannot open files of rank 0, because they are on other hosts.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        copies: int = 1,
        store: dist.Store | None = None,
        followers: Followers | None = None,
        far: Iterable[int] = (),
    ) -> None:
        self.rank = rank
        self.size = size
        self.copies = copies
        self.far = sorted(far)
        self.data_parallel = size // copies
        """Groups of ``copies`` ranks; each group gets other sequences."""
        self._store = store
        self._followers = followers
        self._orders = 0

    @classmethod
    def meet(
        cls,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        copies: int = 1,
        followers: Followers | None = None,
    ) -> "Ranks":
        """Join the other ranks at ``store``, and wait until all are there.

        Tensors on a CPU go over gloo, tensors on a GPU over NCCL.

        Args:
            timeout_s: time limit of this meeting, and of every later collective, in seconds.
            copies, followers: as for the class.

        Raises:
            RankFailed: not all ranks came in time, or one has ended.
        """
        with _opens_files_of_rank_0(store, rank) as is_near:
            store.set(f"here/{rank}", "near" if is_near else "far")
            ends = time.monotonic() + timeout_s
            # A rank that ends while it loads its model should be noticed before the time limit.
            for other in range(size):
                while not store.check([f"here/{other}"]):
                    if followers and (said := followers.ended()):
                        raise RankFailed(said)
                    if time.monotonic() > ends:
                        raise RankFailed(
                            f"Rank {other} of the trainer did not come in {timeout_s:g} s"
                        )
                    time.sleep(0.02)
        far = [other for other in range(size) if store.get(f"here/{other}") == b"far"]
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        return cls(rank, size, copies=copies, store=store, followers=followers, far=far)

    @property
    def near(self) -> list[int]:
        """The ranks on rank 0's host; rank 0 is the first."""
        return [rank for rank in range(self.size) if rank not in self.far]

    def sum(self, values: Any) -> np.ndarray:
        """Sum of each rank's numbers, element by element; the same bits on every rank."""
        found = torch.from_numpy(np.array(values))
        if self.size > 1:
            dist.all_reduce(found)
        return found.numpy()

    def data_sum(self, values: Any) -> np.ndarray:
        """The same, where all ``copies`` of a group have the same numbers, which count once."""
        return np.asarray(self.sum(values) / self.copies)

    def largest(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def fault(self, own: str) -> str:
        """The faults of all ranks, each with its rank's number; empty if no rank has one.

        Call it where a rank alone may have met a fault and the others would go on to a collective.

        Args:
            own: what went wrong here; empty: nothing.
        """
        if self.size == 1 or not self.largest(int(bool(own))):
            return own
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, own)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)

    def everywhere(self, thing: Any) -> Any:
        """Rank 0's ``thing``, on every rank."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def each(self, parts: Sequence[Any]) -> PerRank:
        """``parts``, one for each of the ``data_parallel`` groups, as each rank's argument."""
        return PerRank(part for part in parts for _ in range(self.copies))

    def of_rank_0(self, thing: Any, others: Any) -> PerRank:
        """``thing`` as rank 0's argument, and ``others`` as that of every other rank."""
        return PerRank([thing] + [others] * (self.size - 1))

    def own(self, parts: "Sequence[Any] | None") -> Any:
        """This rank's one of ``parts``, which rank 0 has for each rank; others give None."""
        if self.size == 1:
            assert parts is not None
            return parts[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, list(parts or ()) if self.rank == 0 else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """On rank 0, the value of each of the ``data_parallel`` groups; empty on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value if self.rank % self.copies == 0 else None, found)
        return found[:: self.copies] if found else []

    def passes(self, micro_batches: Iterator[Any]) -> Iterator[Any]:
        """This rank's micro-batches, and then None while another rank has more.

        A forward and a backward pass gather and reduce shards, so every rank runs equally many.
        """
        if self.size == 1:
            yield from micro_batches
            return
        own = list(micro_batches)
        # Before the first pass, whose collectives would mix with it.
        most = int(self.largest(len(own)))
        yield from own
        yield from [None] * (most - len(own))

    def next_order(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        """On a follower: what rank 0 calls, as ``Class.method``, with its arguments.

        None: rank 0 is gone.
        """
        assert self._store is not None
        key, said = f"order/{self._orders}", b""
        while True:
            try:
                self._store.wait([key], timedelta(seconds=POLL_S))
                said = self._store.get(key)
                break
            except dist.DistStoreError:  # No order yet.
                continue
            except RuntimeError:  # The connection broke.
                return None
        if said == END.encode():
            return None
        self._orders += 1
        order: tuple[str, tuple[Any, ...], dict[str, Any]] = self.own(None)
        return order

    @contextmanager
    def together(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """On rank 0: have the followers call the method ``name`` while the block calls it here.

        Raises:
            RankFailed: a follower has ended or did not answer in time.
        """
        if self._followers is None or self._store is None:
            yield
            return
        if said := self._followers.ended():
            raise RankFailed(said)
        with self.naming_the_lost(name):
            self._store.set(f"order/{self._orders}", "")
            self._orders += 1
            orders = [(name, *_part(rank, args, kwargs)) for rank in range(1, self.size)]
            self.own([None, *orders])
            yield

    @contextmanager
    def naming_the_lost(self, what: str) -> Iterator[None]:
        """On rank 0: say which follower was lost if a collective in the block breaks.

        Raises:
            RankFailed: a follower has ended or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self._followers is None or (
                type(error) is not RuntimeError and not isinstance(error, dist.DistError)
            ):
                raise  # One of ours.
            ends = time.monotonic() + NOTICE_S
            while not (said := self._followers.ended()) and time.monotonic() < ends:
                time.sleep(0.01)
            if not said and not is_lost(error):
                raise
            raise RankFailed(
                said or f"The ranks of the trainer did not answer in {what}: {error}"
            ) from error

    def close(self) -> None:
        """Leave the other ranks; rank 0 ends the followers. Safe to call twice."""
        if self._store is None:
            return
        if self._followers:
            self._store.set(f"order/{self._orders}", END)
        dist.destroy_process_group()  # A follower that is in a collective sees it break.
        if self._followers:
            self._followers.close()
        self._store = None


class HasRanks(Protocol):
    """What a class with methods ``on_all_ranks`` has."""

    ranks: Ranks


P = ParamSpec("P")
R = TypeVar("R")


def on_all_ranks(method: Callable[P, R]) -> Callable[P, R]:
    """Let every rank call ``method`` with the arguments that rank 0 calls it with."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        this: HasRanks = args[0]  # type: ignore[assignment]
        with this.ranks.together(method.__qualname__, args[1:], kwargs):
            own, named = _part(this.ranks.rank, args, kwargs)
            return method(*own, **named)

    return call


@contextmanager
def _opens_files_of_rank_0(store: dist.Store, rank: int) -> Iterator[bool]:
    """Whether this rank can: rank 0 has a file without a name while the block lasts."""
    if rank > 0:
        path, _, word = store.get("probe").decode().partition(" ")
        try:
            found = Path(path).read_text(encoding="ascii")
        except (OSError, ValueError):
            found = ""
        yield found == word
        return
    with tempfile.TemporaryFile("w+", encoding="ascii") as file:
        word = secrets.token_hex(16)
        file.write(word)
        file.flush()
        store.set("probe", f"/proc/{os.getpid()}/fd/{file.fileno()} {word}")
        yield True


def _part(
    rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as one rank gets them."""

    def of(one: Any) -> Any:
        return one[rank] if isinstance(one, PerRank) else one

    return tuple(map(of, args)), {name: of(one) for name, one in kwargs.items()}


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Deal items into exactly ``hands`` hands of about equal size; some may be empty.

    Returns the indices of each hand's items, ascending.
    """
    if not sizes:
        return [[] for _ in range(hands)]
    most = max(1, *sizes, -(-sum(sizes) // hands))
    while len(dealt := _C.balance(sizes, most)) > hands:
        most += -(-most // 64)
    return dealt + [[] for _ in range(hands - len(dealt))]


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or late."""
    said = str(error).lower()
    return any(words in said for words in ("timed out", "timeout", "connection"))
