"""What sender and receivers share: settings of a broadcast, its members, and their votes.

A round is one attempt to hand over one version. Its messages, in order, with who posts them:

    round/7              sender    the version and the members, each with its rank
    round/7/ready/ID     member    "ready", or "refused" and why
    round/7/start        sender    whether the transfer begins
    round/7/vote/ID      member    "prepared", "refused" or "cut off", and why
    round/7/crcs/TP      sender    the checksums of the layout of tensor-parallel rank TP
    round/7/outcome      sender    whether the version becomes active, and who is fenced and why
    round/7/served/ID    member    "served"

``sender.py`` is the sender's side and ``receiver.py`` the members' side. docs/weight_protocol.md
says what each crash leaves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kimi_core.weights.broadcast.mailbox import Mailbox, Message
from kimi_core.weights.broadcast.transport import BUCKET_BYTES, Backend, Deadline

JOINS = "joins"
"""The queue in which receivers ask to become members."""


@dataclass(frozen=True)
class BroadcastSettings:
    """How weights are sent. The sender chooses them and tells receivers when they join."""

    backend: Backend = "gloo"
    bucket_bytes: int = BUCKET_BYTES
    answer_s: float = 10.0
    """Seconds that an answer without a transfer may take: ready, vote, served."""
    transfer_s: float = 120.0
    """Seconds that the whole transfer of a round may take, including the set-up of its group."""

    def __post_init__(self) -> None:
        if self.backend not in ("gloo", "nccl"):
            raise ValueError(f"backend = {self.backend!r}; allowed are 'gloo' and 'nccl'")
        for name in ("bucket_bytes", "answer_s", "transfer_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Member:
    """A receiver that has joined. If it joins again, it becomes a new member with a new id."""

    id: str
    name: str
    tp_rank: int


@dataclass(frozen=True)
class JoinRequest:
    """What a receiver sends to join."""

    id: str
    name: str
    tp_rank: int
    layout: str
    """SHA-256 of its arena's layout, in hex."""
    version: int | None
    """The active version of its arena."""
    crcs: list[int]
    """The checksums of that version's entries."""

    @property
    def member(self) -> Member:
        return Member(self.id, self.name, self.tp_rank)


@dataclass(frozen=True)
class Seat:
    """A member's place in the process groups of one round; the sender is rank 0 of each group."""

    member: Member
    rank: int
    """Rank in the group of its tensor-parallel rank."""
    size: int
    """Size of that group, including the sender."""

    def __str__(self) -> str:
        return f"{self.member.name} (tp rank {self.member.tp_rank}, rank {self.rank})"


def seats_of(members: Iterable[Member]) -> list[Seat]:
    """Form one group for each tensor-parallel rank, in the order in which members joined."""
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
    """A member's answer at one stage of a round.

    ``word`` is the expected word, "refused" (the member failed, or its bytes were wrong), "cut off"
    (the transfer failed, perhaps because of another member) or "silent".
    """

    word: str
    why: str = ""

    def message(self) -> Message:
        return {"word": self.word, "why": self.why}


def gather(
    box: Mailbox, number: int, stage: str, seats: Iterable[Seat], seconds: float
) -> Mapping[Seat, Vote]:
    """Wait ``seconds`` for the votes of a stage; members that did not answer count as "silent"."""
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
    """A version could not be sent. Nobody serves it, and nothing was published."""


class Fenced(RuntimeError):
    """The sender excluded this receiver, which was too late or refused what the others accepted.
    Its arena keeps the previous version; ``WeightReceiver.join`` lets it catch up."""
