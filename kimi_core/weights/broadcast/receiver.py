"""Weights between hosts, receiver's side: accept a version when all members have verified it.

Each engine host, or each rank of an engine, runs a receiver. The engine on that host leases from
the same arena and switches between two steps:

    arena = WeightArena.create("/dev/shm/engine", Layout.from_config(config, dtype="bfloat16"))
    with WeightReceiver(("10.0.0.1", 41873), arena, name="host-3") as receiver:
        follow(receiver, switch=lambda version: ...)

Bytes arrive in an idle slot. The arena keeps its previous version until the sender says that every
member has verified the new one, and after any failure.
"""

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn, Self

import torch

from kimi_core.weights.arena import WeightArena, WritableSlot
from kimi_core.weights.broadcast.mailbox import Mailbox, Message
from kimi_core.weights.broadcast.rounds import JOINS, BroadcastSettings, Fenced, JoinRequest, Vote
from kimi_core.weights.broadcast.slot_stream import RunningChecksums, regions_of
from kimi_core.weights.broadcast.transport import (
    Deadline,
    Group,
    TransferError,
    local_address,
    move,
)

JOIN_S = 300.0
"""Seconds that a receiver waits for an answer when it joins; the sender may be in a round."""


class JoinRefused(ValueError):
    """The sender refuses this receiver; asking again without a change will not help."""


@dataclass(frozen=True)
class Taken:
    """A version that has become active in the arena."""

    version: int
    called_off: tuple[str, ...] = ()
    """Why earlier rounds failed, with the names of the members that failed."""


class WeightReceiver:
    """One member of a broadcast. Call ``join`` first, then ``take`` for each version.

    Args:
        address: the ``WeightSender.address``.
        arena: opened to publish, with the layout of ``tp_rank``; engines open it to read.
        name: used in errors. If two receivers have the same name, the later one replaces the
            earlier.
        tp_rank: the tensor-parallel rank whose part of the weights the arena holds.
        token: the sender's.
    """

    def __init__(
        self,
        address: tuple[str, int],
        arena: WeightArena,
        *,
        name: str,
        tp_rank: int = 0,
        token: bytes | None = None,
    ) -> None:
        """Connect to the sender; raises PeerGone if none answers, Refused for another token."""
        self.name = name
        self.address = f"{address[0]}:{address[1]}"
        self._arena = arena
        self._tp_rank = tp_rank
        self._box = Mailbox.connect(*address, token)
        self._host = local_address(*address)
        self._id = ""
        self._settings = BroadcastSettings()
        self._next_round = 0

    def join(self, *, timeout_s: float = JOIN_S) -> int | None:
        """Become a member, and fetch the sender's active version if the arena lacks it.

        Returns:
            The active version of the arena; None if there is none yet.

        Raises:
            JoinRefused: the layout differs, the sender has no such rank, or the arena holds a
                version of another run.
            TransferError, TimeoutError, PeerGone: joining did not succeed in time; try again.
            ValueError: the bytes do not match their checksums; try again.
        """
        self._id = uuid.uuid4().hex
        self._box.ask(JOINS, asdict(self._request()))
        answer = self._box.read(
            f"join/{self._id}",
            Deadline.after(timeout_s),
            f"the answer of the sender at {self.address} to the join request of {self.name}",
        )
        if answer["fault"]:
            raise JoinRefused(f"{self.name} cannot join {self.address}: {answer['fault']}")
        self._settings = BroadcastSettings(**answer["settings"])
        self._next_round = answer["next_round"]
        if answer["version"] is not None:
            self._pull(answer)
        return self._arena.active_version

    def take(self, *, timeout_s: float) -> Taken:
        """Wait for the next version, verify it, and make it active when all have verified it.

        Raises:
            Fenced: the sender excluded this receiver; ``join`` catches up.
            TimeoutError: no version came within ``timeout_s``, or the sender stopped answering
                during a round.
            PeerGone: the sender is gone.
        """
        deadline = Deadline.after(timeout_s)
        called_off: list[str] = []
        while True:
            number = self._next_round
            what = f"the sender at {self.address} to begin round {number}"
            if called_off:
                what += f" after round {number - 1} was called off ({called_off[-1]})"
            call = self._box.read(f"round/{number}", deadline, what)
            self._next_round += 1
            if self._id not in call["members"]:
                raise Fenced(f"{self.name} is not in round {number}: it was too late before")
            outcome = self._go_through(number, call)
            if why := outcome["fenced"].get(self._id):
                raise Fenced(why)
            if outcome["commit"]:
                return Taken(call["version"], tuple(called_off))
            called_off.append(outcome["why"])

    def close(self) -> None:
        """Leave without notice; the sender finds out in its next round."""
        del self._box

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self) -> JoinRequest:
        version, crcs = self._arena.active_version, []
        if version is not None:
            with self._arena.acquire() as lease:
                crcs = lease.crcs
        layout = self._arena.layout.hash.hex()
        return JoinRequest(self._id, self.name, self._tp_rank, layout, version, crcs)

    def _pull(self, answer: Message) -> None:
        version = answer["version"]
        with self._arena.writing(version, deadline_s=self._settings.answer_s) as slot:
            found = self._receive(slot, f"join/{self._id}/bytes", rank=1, size=2)
            slot.verify(answer["crcs"], found=found)
            slot.commit()
        self._box.post(f"join/{self._id}/served", {})

    def _go_through(self, number: int, call: Message) -> Message:
        """Take part in one round; return its outcome. A slot without a commit is abandoned."""
        place, settings = f"round/{number}", self._settings
        with contextlib.ExitStack() as stack:
            slot, vote = None, Vote("ready")
            try:
                writing = self._arena.writing(call["version"], deadline_s=settings.answer_s / 2)
                slot = stack.enter_context(writing)
            except (ValueError, TimeoutError) as error:
                vote = Vote("refused", str(error))
            self._box.post(f"{place}/ready/{self._id}", vote.message())
            start = self._read(f"{place}/start", 2 * settings.answer_s, f"start round {number}")
            if start["go"]:
                assert slot is not None, "a round does not start when one refuses"
                vote = self._verify(slot, number, call["members"][self._id])
                self._box.post(f"{place}/vote/{self._id}", vote.message())
            seconds = settings.transfer_s + 2 * settings.answer_s
            outcome = self._read(f"{place}/outcome", seconds, f"conclude round {number}")
            if outcome["commit"]:
                assert slot is not None, "a round is committed when all are prepared"
                slot.commit()
                self._box.post(f"{place}/served/{self._id}", Vote("served").message())
        return outcome

    def _verify(self, slot: WritableSlot, number: int, seat: Message) -> Vote:
        """Receive into the slot and compare checksums with the sender's."""
        place, settings = f"round/{number}", self._settings
        try:
            bytes_at = f"{place}/bytes/{self._tp_rank}"
            found = self._receive(slot, bytes_at, rank=seat["rank"], size=seat["size"])
            seconds = settings.transfer_s + settings.answer_s
            what = f"send the checksums of round {number}"
            sent = self._read(f"{place}/crcs/{self._tp_rank}", seconds, what)
            slot.verify(sent["crcs"], found=found)
        except (TransferError, TimeoutError) as error:
            return Vote("cut off", str(error))
        except ValueError as error:
            return Vote("refused", str(error))
        return Vote("prepared")

    def _receive(self, slot: WritableSlot, prefix: str, *, rank: int, size: int) -> list[int]:
        """Fill the slot from the sender; return the checksums of the bytes that arrived."""
        settings, deadline = self._settings, Deadline.after(self._settings.transfer_s)
        sums = RunningChecksums(slot.payload, regions_of(self._arena))
        with Group(
            self._box.store,
            prefix,
            rank=rank,
            size=size,
            deadline=deadline,
            host=self._host,
            backend=settings.backend,
        ) as group:
            payload = torch.from_numpy(slot.payload)
            move(group, payload, deadline, landed=sums.take, bucket_bytes=settings.bucket_bytes)
        return sums.crcs

    def _read(self, key: str, seconds: float, what: str) -> Message:
        deadline = Deadline.after(seconds)
        return self._box.read(key, deadline, f"the sender at {self.address} to {what}")


def follow(
    receiver: WeightReceiver,
    *,
    switch: Callable[[int], None],
    idle_s: float = 3600.0,
) -> NoReturn:
    """The loop of an engine host: keep an arena at the sender's version until the sender leaves.

    ``switch`` is called with each version once it is active in the arena. A receiver that is fenced
    joins again and fetches what it missed.

    Raises:
        PeerGone: the sender closed or died.
        TimeoutError: it published nothing for ``idle_s`` seconds, or stopped answering in a round.
        JoinRefused, TransferError, ValueError: as ``WeightReceiver.join``.
    """
    served = receiver.join()
    while True:
        if served is not None:
            switch(served)
        try:
            served = receiver.take(timeout_s=idle_s).version
        except Fenced:
            served = receiver.join()
