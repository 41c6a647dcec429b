"""Weights between hosts, sender's side: no member serves a version before all have verified it.

A run with ``cluster.listen`` publishes in this way; from Python it stands in place of
``WeightArena.publish``:

    arena = WeightArena.create("/dev/shm/run", layout)
    with WeightSender([arena], host="10.0.0.1") as sender:
        print(sender.address)                     # give it to each engine host
        ...
        published = sender.publish(model.named_parameters(), version=7)
        published.served, published.fenced

Each engine host runs ``receiver.follow``. With tensor parallelism the sender has one arena for the
layout of each rank, and each receiver gets the bytes of its rank only. The sender's arenas flip
together with the others, so engines on its host can read them.

A receiver that does not answer in time, or whose bytes are wrong, is fenced: the others continue in
a new group without it. It can join again, and then fetches the active version point to point.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch

from kimi_core.weights.arena import NamedTensors, WeightArena, WritableSlot
from kimi_core.weights.broadcast.mailbox import Mailbox, Message
from kimi_core.weights.broadcast.rounds import (
    JOINS,
    BroadcastError,
    BroadcastSettings,
    JoinRequest,
    Member,
    Seat,
    Vote,
    gather,
    seats_of,
)
from kimi_core.weights.broadcast.slot_stream import SlotWriter, bytes_of
from kimi_core.weights.broadcast.transport import Deadline, Group, TransferError, move

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.02
"""Seconds between two looks at the queue of join requests."""


@dataclass(frozen=True)
class Published:
    """The result of a successful publication."""

    version: int
    served: tuple[str, ...]
    """Names of the receivers that serve it."""
    fenced: Mapping[str, str] = field(default_factory=dict)
    """Name of each receiver that was fenced → why; it keeps its previous version."""


class WeightSender:
    """Publishes into its arenas and those of all members, or into none of them.

    Args:
        arenas: one for each tensor-parallel rank, in order, opened to publish, all at the same
            version.
        host: address of this host that receivers can reach; the sender listens on no other.
        settings: None for the defaults.
        token: receivers have to know it, in order to join; None: nobody is asked.
    """

    def __init__(
        self,
        arenas: Sequence[WeightArena],
        *,
        host: str,
        settings: BroadcastSettings | None = None,
        token: bytes | None = None,
    ) -> None:
        versions = {arena.active_version for arena in arenas}
        if len(versions) != 1:
            raise ValueError(
                f"{len(arenas)} arenas at versions {sorted(map(str, versions))}; give one for each "
                "tensor-parallel rank, all at the same version"
            )
        self.settings = settings or BroadcastSettings()
        self._arenas = list(arenas)
        self._box = Mailbox.serve(host, token)
        self.address = (host, self._box.port)
        self._members: dict[str, Member] = {}
        self._round = 0
        self._lock = threading.Lock()  # Held during a round and during a join.
        self._closing = threading.Event()
        self._joining = threading.Thread(target=self._admit_all, name="weights-join", daemon=True)
        self._joining.start()

    @property
    def members(self) -> list[str]:
        """Names of the receivers that will get the next version."""
        return [member.name for member in list(self._members.values())]

    def publish(self, named_tensors: NamedTensors, *, version: int) -> Published:
        """Send a version to every member and publish it in the sender's own arenas.

        Every round but the last fences at least one member. ``settings`` limits the time of each
        round. An error leaves every arena as it was.

        Args:
            named_tensors: as for ``WeightArena.publish``; they must not change during the call.

        Raises:
            ValueError, TimeoutError: as ``WeightArena.publish``.
            BroadcastError: every member refused the version, or the transfer failed and no member
                is to blame. Nobody is fenced; call again to retry.
        """
        tensors = _pairs(named_tensors)
        with self._lock, contextlib.ExitStack() as slots:
            return self._publish(
                [
                    SlotWriter(arena, slots.enter_context(arena.writing(version)), tensors)
                    for arena in self._arenas
                ]
            )

    def send_filled(self, slot: WritableSlot, crcs: Sequence[int]) -> Published:
        """As ``publish``, for a slot of the only arena that others have filled and summed."""
        with self._lock:
            return self._publish([_Filled(slot, list(crcs))])

    def forget(self, name: str) -> None:
        """Do not wait for a receiver that is known to be lost; it may join again."""
        for one in [one for one in list(self._members.values()) if one.name == name]:
            self._members.pop(one.id, None)

    def expel(self) -> None:
        """Forget all members; each finds out in the next round, and may join again."""
        with self._lock:
            self._members.clear()

    def close(self) -> None:
        """Stop listening; members then find the sender gone."""
        self._closing.set()
        self._joining.join()
        self._box.close()
        del self._box

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish(self, writers: "Sequence[SlotWriter | _Filled]") -> Published:
        fenced: dict[str, str] = {}
        while True:
            self._round += 1
            members = list(self._members.values())
            current_round = _Round(self._box, self.settings, self._round, members, writers)
            current_round.run()
            for seat, why in current_round.fenced.items():
                fenced[seat.member.name] = why
                self._members.pop(seat.member.id, None)
            if current_round.served is not None:
                names = tuple(seat.member.name for seat in current_round.served)
                return Published(writers[0].slot.version, names, fenced)

    # ---- Receivers that join

    def _admit_all(self) -> None:
        while not self._closing.wait(_LOOK_S):
            with self._lock:
                asked = self._box.next_asked(JOINS)
                if asked is not None:
                    self._admit(asked)

    def _admit(self, asked: bytes) -> None:
        """Answer one receiver, and send it the active version if it lacks it."""
        try:
            request = JoinRequest(**json.loads(asked))
        except (ValueError, TypeError) as error:
            _LOG.warning("Dropped a malformed join request: %r", error)
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
            "settings": asdict(self.settings),
            "next_round": self._round + 1,
        }
        self._box.post(f"join/{member.id}", answer)
        if fault or (behind and not self._send_current(member)):
            return
        self.forget(member.name)
        self._members[member.id] = member

    def _is_behind(self, request: JoinRequest) -> bool:
        """Whether the receiver lacks the active version. Raises ValueError if it cannot join."""
        if not 0 <= request.tp_rank < len(self._arenas):
            most = len(self._arenas) - 1
            raise ValueError(f"tp_rank = {request.tp_rank}; allowed are 0 to {most}")
        layout = self._arenas[request.tp_rank].layout.hash.hex()
        if request.layout != layout:
            raise ValueError(
                f"the layout of its arena ({request.layout[:12]}…) is not that of the sender for "
                f"tp rank {request.tp_rank} ({layout[:12]}…); make both from the same config"
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
            + "; create its arena again"
        )

    def _crcs(self, tp_rank: int) -> list[int]:
        with self._arenas[tp_rank].acquire() as lease:
            return lease.crcs

    def _send_current(self, member: Member) -> bool:
        """Send the active version to one member; whether the member serves it now."""
        place = f"join/{member.id}"
        deadline = Deadline.after(self.settings.transfer_s)
        try:
            with (
                self._arenas[member.tp_rank].acquire() as lease,
                _meet(self._box, f"{place}/bytes", 2, self.settings, deadline) as group,
            ):
                move(group, bytes_of(lease), deadline, bucket_bytes=self.settings.bucket_bytes)
            limit = Deadline.after(self.settings.answer_s)
            self._box.read(f"{place}/served", limit, f"{member.name} to serve what it pulled")
        except (TransferError, TimeoutError) as error:
            _LOG.warning("%s did not get the active version: %s", member.name, error)
            return False
        finally:
            self._box.forget(f"{place}/")
        return True


@dataclass(frozen=True)
class _Filled:
    """In place of a ``SlotWriter``: the bytes are there already."""

    slot: WritableSlot
    crcs: list[int]

    def make_ready(self, start: int, end: int) -> None:
        """Do nothing."""

    def finish(self) -> list[int]:
        self.slot.verify(self.crcs, found=self.crcs)
        return self.crcs


class _Round:
    """One round, from the sender's side."""

    def __init__(
        self,
        box: Mailbox,
        settings: BroadcastSettings,
        number: int,
        members: Iterable[Member],
        writers: "Sequence[SlotWriter | _Filled]",
    ) -> None:
        self.fenced: dict[Seat, str] = {}
        self.served: list[Seat] | None = None
        """The members that serve the version; None if the round was called off."""
        self._box, self._settings = box, settings
        self._number = number
        self._seats = seats_of(members)
        self._writers = writers
        self._version = writers[0].slot.version

    def run(self) -> None:
        """Prepare, then commit or call off.

        Raises:
            BroadcastError: the round was called off, and fencing members would not help.
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
            for writer in self._writers:
                writer.slot.commit()
        self._conclude(fault)
        if not fault:
            self._count_served()
        elif not self.fenced:
            raise BroadcastError(f"Version {self._version} was not published on any host: {fault}")

    def _prepare(self) -> str:
        """Do everything before the decision; return why the round must be called off, or ''."""
        votes = self._gather("ready", self._settings.answer_s)
        fault = self._faults(votes, "ready")
        self._post("/start", {"go": not fault})
        if fault:
            return fault
        cut = self._send()
        for tp_rank, writer in enumerate(self._writers):
            self._post(f"/crcs/{tp_rank}", {"crcs": writer.finish()})
        fault = self._faults(self._gather("vote", self._settings.answer_s), "prepared")
        return "; ".join([fault, *cut]) if fault else ""

    def _send(self) -> list[str]:
        """Send each group its shard; return why transfers failed. After a failure the remaining
        groups are still sent to, because their members wait for it."""
        deadline = Deadline.after(self._settings.transfer_s)
        faults = []
        for tp_rank, writer in enumerate(self._writers):
            sizes = [seat.size for seat in self._seats if seat.member.tp_rank == tp_rank]
            if not sizes:
                continue
            prefix = f"round/{self._number}/bytes/{tp_rank}"
            try:
                with _meet(self._box, prefix, sizes[0], self._settings, deadline) as group:
                    move(
                        group,
                        torch.from_numpy(writer.slot.payload),
                        deadline,
                        ready=writer.make_ready,
                        bucket_bytes=self._settings.bucket_bytes,
                    )
            except TransferError as error:
                faults.append(f"the sender saw: {error}")
        return faults

    def _faults(self, votes: Mapping[Seat, Vote], hoped: str) -> str:
        """Why this stage failed, or ''. Fences the members to blame, unless all of them refused:
        then the fault is not theirs."""
        blamed = {s: v for s, v in votes.items() if v.word in ("silent", "refused")}
        if blamed:
            whys = {seat: f"{seat} {vote.word}: {vote.why}" for seat, vote in blamed.items()}
            if any(vote.word != "refused" for vote in votes.values()):
                self.fenced |= whys
        else:
            whys = {s: f"{s} {v.word}: {v.why}" for s, v in votes.items() if v.word != hoped}
        return "; ".join(whys.values())

    def _count_served(self) -> None:
        votes = self._gather("served", self._settings.answer_s)
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
        """Delete the previous round's messages, except those that a late member may look for."""
        place = f"round/{self._number - 1}/"
        self._box.forget(place, but=(f"{place}start", f"{place}outcome"))


def _meet(
    box: Mailbox, prefix: str, size: int, settings: BroadcastSettings, deadline: Deadline
) -> Group:
    store, backend = box.store, settings.backend
    return Group(
        store, prefix, rank=0, size=size, deadline=deadline, host=box.host, backend=backend
    )


def _pairs(named_tensors: NamedTensors) -> list[tuple[str, Any]]:
    """The tensors as a list, because each arena iterates over them."""
    return list(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
