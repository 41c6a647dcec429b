"""Weights between hosts, the sender's side: nobody serves a version before all have verified it.

In place of the local ``WeightArena.publish`` the trainer calls ``WeightSender.publish``:

    arena = WeightArena.create("/dev/shm/run", layout)
    with WeightSender([arena], host="10.0.0.1") as sender:
        print(sender.address)                     # what each engine host is started with
        ...
        published = sender.publish(model.named_parameters(), version=7)
        published.served, published.fenced

and each engine host runs ``receiver.follow``. With tensor parallelism the sender has an arena for
each rank's layout, and each receiver gets the bytes of its own rank only. The sender's arenas are
published in the same instant as the others, so engines on its own host may read them.

A receiver that does not answer in time, or whose bytes are not right, is fenced: the rest go on in
a new group without it. It joins again when it can, and pulls what is served then point to point.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch

from kimi_core.weights.arena import NamedTensors, WeightArena
from kimi_core.weights.broadcast.filling import Filling, bytes_of
from kimi_core.weights.broadcast.mailbox import Mailbox, Message
from kimi_core.weights.broadcast.rounds import (
    JOINS,
    BroadcastError,
    Member,
    Request,
    Seat,
    Terms,
    Vote,
    gather,
    seats_of,
)
from kimi_core.weights.broadcast.transport import Deadline, Group, TransferError, move

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.02
"""How often the line of those who want to join is looked at."""


@dataclass(frozen=True)
class Published:
    """What became of a version that is served now."""

    version: int
    served: tuple[str, ...]
    """Names of the receivers that serve it."""
    fenced: Mapping[str, str] = field(default_factory=dict)
    """Names of those left behind, and why; they serve what they served."""


class WeightSender:
    """Publishes into its own arenas and those of its members, all or none of them.

    Args:
        arenas: opened to publish, one for each tensor-parallel rank, in their order; each at the
            same version.
        host: the address of this host that receivers reach; it listens there and nowhere else.
    """

    def __init__(
        self, arenas: Sequence[WeightArena], *, host: str, terms: Terms | None = None
    ) -> None:
        versions = {arena.active_version for arena in arenas}
        if len(versions) != 1:
            raise ValueError(
                f"{len(arenas)} arenas at versions {sorted(map(str, versions))}: give one for each "
                "tensor-parallel rank, all at the same version"
            )
        self.terms = terms or Terms()
        self._arenas = list(arenas)
        self._box = Mailbox.serve(host)
        self.address = (host, self._box.port)
        self._members: dict[str, Member] = {}
        self._round = 0
        self._lock = threading.Lock()  # A round and an admission are never under way at once.
        self._closing = threading.Event()
        self._doorman = threading.Thread(target=self._admit_all, name="weights-join", daemon=True)
        self._doorman.start()

    @property
    def members(self) -> list[str]:
        """Names of the receivers that the next version goes to."""
        return [member.name for member in list(self._members.values())]

    def publish(self, named_tensors: NamedTensors, *, version: int) -> Published:
        """Hand a version to every member and serve it here; takes the place of the local publish.

        Each round fences at least one member or is the last, and has its time limits from
        ``terms``. An error leaves every arena as it was.

        Args:
            named_tensors: as for ``WeightArena.publish``; they must not change meanwhile.

        Raises:
            ValueError, TimeoutError: as ``WeightArena.publish``.
            BroadcastError: every member refused it, or no bytes came through and nobody is to
                blame for it. Nobody is fenced then; call again to try again.
        """
        tensors = _pairs(named_tensors)
        fenced: dict[str, str] = {}
        with self._lock, contextlib.ExitStack() as slots:
            fillings = [
                Filling(arena, slots.enter_context(arena.writing(version)), tensors)
                for arena in self._arenas
            ]
            while True:
                self._round += 1
                members = self._members.values()
                attempt = _Attempt(self._box, self.terms, self._round, members, fillings)
                attempt.run()
                for seat, why in attempt.fenced.items():
                    fenced[seat.member.name] = why
                    del self._members[seat.member.id]
                if attempt.served is not None:
                    names = tuple(seat.member.name for seat in attempt.served)
                    return Published(version, names, fenced)

    def close(self) -> None:
        """Stop to listen; members find the sender gone."""
        self._closing.set()
        self._doorman.join()
        del self._box

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Those who join

    def _admit_all(self) -> None:
        while not self._closing.wait(_LOOK_S):
            with self._lock:
                asked = self._box.next_asked(JOINS)
                if asked is not None:
                    self._admit(asked)

    def _admit(self, asked: bytes) -> None:
        """Answer one receiver, and send it what is served if it does not have it."""
        try:
            request = Request(**json.loads(asked))
        except (ValueError, TypeError) as error:
            _LOG.warning("A request to join is no such thing and was dropped: %r", error)
            return
        member, fault, behind = request.member, "", False
        try:
            behind = self._is_behind(request)
        except ValueError as error:
            fault = str(error)
        answer = {
            "fault": fault,
            "version": self._arenas[0].active_version if behind else None,
            "crcs": self._crcs(member.tp_rank) if behind else [],
            "terms": asdict(self.terms),
            "next_round": self._round + 1,
        }
        self._box.post(f"join/{member.id}", answer)
        if fault or (behind and not self._send_current(member)):
            return
        for old in [m for m in self._members.values() if m.name == member.name]:
            del self._members[old.id]
        self._members[member.id] = member

    def _is_behind(self, request: Request) -> bool:
        """Whether the receiver lacks what is served. Raises ValueError if it cannot join."""
        if not 0 <= request.tp_rank < len(self._arenas):
            most = len(self._arenas) - 1
            raise ValueError(f"tp_rank = {request.tp_rank}: the sender has 0 to {most}")
        layout = self._arenas[request.tp_rank].layout.hash.hex()
        if request.layout != layout:
            raise ValueError(
                f"the layout of its arena ({request.layout[:12]}…) is not the sender's for tp rank "
                f"{request.tp_rank} ({layout[:12]}…): make both from the same config"
            )
        current, held = self._arenas[0].active_version, request.version
        if held is None:
            return current is not None
        if current is not None and held < current:
            return True
        if held == current and request.crcs == self._crcs(request.tp_rank):
            return False
        raise ValueError(
            f"its arena has version {held}, and the sender "
            + ("none yet" if current is None else f"version {current} with other weights")
            + ": make its arena anew"
        )

    def _crcs(self, tp_rank: int) -> list[int]:
        with self._arenas[tp_rank].acquire() as lease:
            return lease.crcs

    def _send_current(self, member: Member) -> bool:
        """Point to point. Whether it serves the version now."""
        place = f"join/{member.id}"
        deadline = Deadline.after(self.terms.transfer_s)
        try:
            with (
                self._arenas[member.tp_rank].acquire() as lease,
                _meet(self._box, f"{place}/bytes", 2, self.terms, deadline) as group,
            ):
                move(group, bytes_of(lease), deadline, bucket_bytes=self.terms.bucket_bytes)
            limit = Deadline.after(self.terms.answer_s)
            self._box.read(f"{place}/served", limit, f"{member.name} to serve what it pulled")
        except (TransferError, TimeoutError) as error:
            _LOG.warning("%s did not get the current weights: %s", member.name, error)
            return False
        finally:
            self._box.forget(f"{place}/")
        return True


class _Attempt:
    """One round, as the sender goes through it."""

    def __init__(
        self,
        box: Mailbox,
        terms: Terms,
        number: int,
        members: Iterable[Member],
        fillings: Sequence[Filling],
    ) -> None:
        self.fenced: dict[Seat, str] = {}
        self.served: list[Seat] | None = None
        """Who serves the version; None where the round was called off."""
        self._box, self._terms = box, terms
        self._number = number
        self._seats = seats_of(members)
        self._fillings = fillings
        self._version = fillings[0].slot.version

    def run(self) -> None:
        """Prepare, then commit or call it off.

        Raises:
            BroadcastError: it was called off, and to fence somebody would not help.
        """
        self._forget()
        members = {s.member.id: {"rank": s.rank, "size": s.size} for s in self._seats}
        self._post("", {"version": self._version, "members": members})
        try:
            fault = self._prepare()
        except BaseException as error:
            self._conclude(f"the sender failed: {type(error).__name__}: {error}")
            raise
        if not fault:
            for filling in self._fillings:
                filling.slot.commit()
        self._conclude(fault)
        if not fault:
            self._count_served()
        elif not self.fenced:
            raise BroadcastError(
                f"Version {self._version} is served by nobody, here neither: {fault}"
            )

    def _prepare(self) -> str:
        """Everything before the decision; returns why there is to be none, or nothing."""
        votes = self._gather("ready", self._terms.answer_s)
        fault = self._faults(votes, "ready")
        self._post("/start", {"go": not fault})
        if fault:
            return fault
        cut = self._send()
        for tp_rank, filling in enumerate(self._fillings):
            self._post(f"/crcs/{tp_rank}", {"crcs": filling.finish()})
        fault = self._faults(self._gather("vote", self._terms.answer_s), "prepared")
        return "; ".join([fault, *cut]) if fault else ""

    def _send(self) -> list[str]:
        """Send each group its shard; returns why that failed where it did. A group is served also
        after another one failed, as its members wait for it."""
        deadline = Deadline.after(self._terms.transfer_s)
        faults = []
        for tp_rank, filling in enumerate(self._fillings):
            sizes = [seat.size for seat in self._seats if seat.member.tp_rank == tp_rank]
            if not sizes:
                continue
            prefix = f"round/{self._number}/bytes/{tp_rank}"
            try:
                with _meet(self._box, prefix, sizes[0], self._terms, deadline) as group:
                    move(
                        group,
                        torch.from_numpy(filling.slot.payload),
                        deadline,
                        ready=filling.make_ready,
                        bucket_bytes=self._terms.bucket_bytes,
                    )
            except TransferError as error:
                faults.append(f"the sender saw: {error}")
        return faults

    def _faults(self, votes: Mapping[Seat, Vote], hoped: str) -> str:
        """Why this stage has failed, or nothing. Fences those to blame, unless all refuse: then the
        fault is not theirs."""
        blamed = {s: v for s, v in votes.items() if v.word in ("silent", "refused")}
        if blamed:
            whys = {seat: f"{seat} {vote.word}: {vote.why}" for seat, vote in blamed.items()}
            if any(vote.word != "refused" for vote in votes.values()):
                self.fenced |= whys
        else:
            whys = {s: f"{s} {v.word}: {v.why}" for s, v in votes.items() if v.word != hoped}
        return "; ".join(whys.values())

    def _count_served(self) -> None:
        votes = self._gather("served", self._terms.answer_s)
        self.fenced |= {s: f"{s} {v.word}: {v.why}" for s, v in votes.items() if v.word != "served"}
        self.served = [seat for seat, vote in votes.items() if vote.word == "served"]

    def _conclude(self, fault: str) -> None:
        fenced = {seat.member.id: why for seat, why in self.fenced.items()}
        self._post("/outcome", {"commit": not fault, "why": fault, "fenced": fenced})

    def _gather(self, stage: str, seconds: float) -> Mapping[Seat, Vote]:
        return gather(self._box, self._number, stage, self._seats, seconds)

    def _post(self, suffix: str, message: Message) -> None:
        self._box.post(f"round/{self._number}{suffix}", message)

    def _forget(self) -> None:
        """Take away what the round before has left, but not what one who is late may look for."""
        place = f"round/{self._number - 1}/"
        self._box.forget(place, but=(f"{place}start", f"{place}outcome"))


def _meet(box: Mailbox, prefix: str, size: int, terms: Terms, deadline: Deadline) -> Group:
    return Group(box.store, prefix, rank=0, size=size, deadline=deadline, backend=terms.backend)


def _pairs(named_tensors: NamedTensors) -> list[tuple[str, Any]]:
    """Each arena goes through them, and an iterator can be gone through once."""
    return list(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
