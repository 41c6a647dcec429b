"""What sender and receivers agree on: the terms of a broadcast, its members, and how they vote.

A round is one attempt to hand over one version. Its messages, in order, with who posts them:

    round/7              sender    the version and the members, each with its rank
    round/7/ready/ID     member    "ready", or "refused" and why
    round/7/start        sender    whether bytes will move
    round/7/vote/ID      member    "prepared", "refused" or "cut off", and why
    round/7/crcs/TP      sender    the checksums of the layout of tensor-parallel rank TP
    round/7/outcome      sender    whether the version is served, and who is fenced and why
    round/7/served/ID    member    "served"

``broadcast.py`` is the sender's side and ``receiver.py`` the members'; docs/weight_protocol.md says
what each crash leaves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kimi_core.weights.broadcast.mailbox import Mailbox, Message
from kimi_core.weights.broadcast.transport import BUCKET_BYTES, Backend, Deadline

JOINS = "joins"
"""The line in which receivers ask to become members."""


@dataclass(frozen=True)
class Terms:
    """How weights are sent. The sender's count; receivers are told them when they join."""

    backend: Backend = "gloo"
    bucket_bytes: int = BUCKET_BYTES
    answer_s: float = 10.0
    """How long an answer may take that needs no bytes: ready, vote, served."""
    transfer_s: float = 120.0
    """How long all buckets of a round may take together, the meeting of the ranks included."""

    def __post_init__(self) -> None:
        if self.backend not in ("gloo", "nccl"):
            raise ValueError(f"backend = {self.backend!r}: allowed are 'gloo' and 'nccl'")
        for name in ("bucket_bytes", "answer_s", "transfer_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True)
class Member:
    """A receiver that has joined. One that joins again is another member with the same name."""

    id: str
    name: str
    tp_rank: int


@dataclass(frozen=True)
class Request:
    """What a receiver says of itself when it joins."""

    id: str
    name: str
    tp_rank: int
    layout: str
    """SHA-256 of its arena's layout, in hex."""
    version: int | None
    """That its arena serves."""
    crcs: list[int]
    """Of what its arena serves."""

    @property
    def member(self) -> Member:
        return Member(self.id, self.name, self.tp_rank)


@dataclass(frozen=True)
class Seat:
    """Where a member sits in a round: rank 0 of a group is the sender."""

    member: Member
    rank: int
    """In the group of its tensor-parallel rank."""
    size: int
    """Of that group, the sender included."""

    def __str__(self) -> str:
        return f"{self.member.name} (tp rank {self.member.tp_rank}, rank {self.rank})"


def seats_of(members: Iterable[Member]) -> list[Seat]:
    """One group for each tensor-parallel rank, members in the order in which they joined."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.tp_rank, []).append(member)
    return [
        Seat(member, rank, len(group) + 1)
        for group in groups.values()
        for rank, member in enumerate(group, 1)
    ]


@dataclass(frozen=True)
class Vote:
    """What a member says at one stage of a round.

    ``word`` is what was hoped for, "refused" (its own fault, or that of its bytes), "cut off" (the
    transfer failed, be it through another) or "silent".
    """

    word: str
    why: str = ""

    def message(self) -> Message:
        return {"word": self.word, "why": self.why}


def gather(
    box: Mailbox, number: int, stage: str, seats: Iterable[Seat], seconds: float
) -> Mapping[Seat, Vote]:
    """Every member's vote at a stage; "silent" for those that have not voted within ``seconds``."""
    deadline = Deadline.after(seconds)
    votes = {}
    for seat in seats:
        try:
            message = box.read(f"round/{number}/{stage}/{seat.member.id}", deadline, f"{seat}")
            votes[seat] = Vote(message["word"], message["why"])
        except TimeoutError:
            votes[seat] = Vote("silent", f"did not say {stage!r} within {seconds:g} s")
    return votes


class BroadcastError(RuntimeError):
    """A version could not be handed over; nothing was published and nobody serves it."""


class Fenced(RuntimeError):
    """This receiver takes no part any more: it was too late, or refused what others took. It serves
    what it served; ``WeightReceiver.join`` lets it catch up."""
