"""Weights between hosts with the receivers in threads: who is refused, fenced, served. What needs
processes that die is in ``tests/dist``."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from weights.broadcast.broadcast_fixtures import QUICK, digest, expected, make_arena, weights

from kimi_core.cluster.handshake import Refused
from kimi_core.weights.broadcast.mailbox import Mailbox, PeerGone
from kimi_core.weights.broadcast.receiver import JoinRefused, WeightReceiver
from kimi_core.weights.broadcast.rounds import BroadcastError, BroadcastSettings, Fenced
from kimi_core.weights.broadcast.sender import WeightSender
from kimi_core.weights.broadcast.transport import move

SOON = 60
"""Seconds within which all of a test's steps are over, also on a busy machine."""


@pytest.fixture(autouse=True)
def _loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def sender(tmp_path):
    with WeightSender([make_arena(tmp_path / "s")], host="127.0.0.1", settings=QUICK) as sender:
        yield sender


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def member(sender, path, name, **layout) -> WeightReceiver:
    rank = layout.get("tp_rank", 0)
    receiver = WeightReceiver(sender.address, make_arena(path, **layout), name=name, tp_rank=rank)
    receiver.join(timeout_s=SOON)
    return receiver


def members_are(sender, names) -> None:
    until = time.monotonic() + SOON
    while sorted(sender.members) != sorted(names):
        assert time.monotonic() < until, sender.members
        time.sleep(0.005)


def serving_version_1(sender, tmp_path, pool, names) -> list[WeightReceiver]:
    receivers = [member(sender, tmp_path / name, name) for name in names]
    members_are(sender, names)
    taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
    sender.publish(weights(1), version=1)
    assert [t.result().version for t in taken] == [1] * len(names)
    return receivers


def test_two_receivers_serve_what_was_published(sender, tmp_path, pool):
    receivers = [member(sender, tmp_path / name, name) for name in "ab"]
    members_are(sender, "ab")
    for version in (3, 4):
        taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
        published = sender.publish(weights(version), version=version)
        assert (published.served, published.fenced) == (("a", "b"), {})
        assert [t.result().version for t in taken] == [version] * 2
        truth = expected(tmp_path, version)
        assert [digest(r._arena) for r in receivers] == [truth] * 2
        assert digest(sender._arenas[0]) == truth


def test_without_receivers_it_is_a_local_publish(sender, tmp_path):
    assert sender.publish(weights(0), version=0).served == ()
    assert digest(sender._arenas[0]) == expected(tmp_path, 0)
    with pytest.raises(ValueError, match="versions only grow"):
        sender.publish(weights(0), version=0)


def test_one_who_joins_late_pulls_what_is_served(sender, tmp_path, pool):
    sender.publish(weights(5), version=5)
    late = member(sender, tmp_path / "late", "late")
    assert digest(late._arena) == expected(tmp_path, 5)
    members_are(sender, ["late"])
    taken = pool.submit(late.take, timeout_s=SOON)
    assert sender.publish(weights(6), version=6).served == ("late",)
    assert taken.result().version == 6
    again = WeightReceiver(sender.address, late._arena, name="late")
    assert again.join(timeout_s=SOON) == 6, "it has the version: nothing is pulled"


def test_each_rank_gets_its_shard_only(tmp_path, pool):
    arenas = [make_arena(tmp_path / f"s{r}", tp_rank=r, tp_size=2) for r in range(2)]
    whole = make_arena(tmp_path / "whole")
    with WeightSender(arenas, host="127.0.0.1", settings=QUICK) as sender:
        receivers = [
            member(sender, tmp_path / f"r{r}", f"r{r}", tp_rank=r, tp_size=2) for r in range(2)
        ]
        members_are(sender, ["r0", "r1"])
        taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
        sender.publish(weights(1), version=1)
        assert [t.result().version for t in taken] == [1, 1]
        for rank, receiver in enumerate(receivers):
            assert digest(receiver._arena) == expected(tmp_path, 1, tp_rank=rank, tp_size=2)
            assert receiver._arena.layout.payload_bytes < 0.6 * whole.layout.payload_bytes


@pytest.mark.parametrize(
    ("layout", "tp_rank", "message"),
    [
        ({"dtype": "float32"}, 0, "layout of its arena .* is not that of the sender"),
        ({}, 1, "tp_rank = 1; allowed are 0 to 0"),
    ],
)
def test_who_does_not_fit_cannot_join(sender, tmp_path, layout, tp_rank, message):
    arena = make_arena(tmp_path / "r", **layout)
    receiver = WeightReceiver(sender.address, arena, name="r", tp_rank=tp_rank)
    with pytest.raises(JoinRefused, match=message):
        receiver.join(timeout_s=SOON)
    assert sender.members == []


def test_an_arena_of_another_run_cannot_join(sender, tmp_path):
    sender.publish(weights(2), version=2)
    for version, message in ((3, "version 3, and the sender version 2"), (2, "other weights")):
        with make_arena(tmp_path / f"r{version}") as arena:
            arena.publish(weights(99), version=version)
            receiver = WeightReceiver(sender.address, arena, name="r")
            with pytest.raises(JoinRefused, match=message):
                receiver.join(timeout_s=SOON)
            assert arena.active_version == version


def flip_on(monkeypatch, module: str, hook: str, rank: int) -> None:
    """From now on a bit changes on the way, when rank ``rank`` has called ``hook``."""

    def flipping(group, payload, deadline, **given):
        hooked = given[hook]

        def wrapped(start, end):
            if hook == "ready":
                hooked(start, end)
            if group.rank == rank and start == 2 * QUICK.bucket_bytes:
                payload[start + 7] ^= 16
            if hook == "landed":
                hooked(start, end)

        return move(group, payload, deadline, **{**given, hook: wrapped})

    monkeypatch.setattr(f"kimi_core.weights.broadcast.{module}.move", flipping)


def test_who_got_a_flipped_bit_is_fenced_and_catches_up(sender, tmp_path, pool, monkeypatch):
    good, bad = serving_version_1(sender, tmp_path, pool, ["good", "bad"])
    with monkeypatch.context() as patch:
        flip_on(patch, "receiver", "landed", rank=2)
        taken = [pool.submit(r.take, timeout_s=SOON) for r in (good, bad)]
        published = sender.publish(weights(2), version=2)
    assert published.served == ("good",)
    assert re.search(
        r"bad \(tp rank 0, rank 2\) refused.* does not match its checks", published.fenced["bad"]
    )
    result = taken[0].result()
    assert result.version == 2 and "bad (tp rank 0, rank 2) refused" in result.called_off[0]
    with pytest.raises(Fenced, match="does not match its checksum"):
        taken[1].result()
    assert digest(bad._arena) == expected(tmp_path, 1)
    assert bad.join(timeout_s=SOON) == 2
    assert digest(bad._arena) == expected(tmp_path, 2)


def test_a_bit_flipped_for_all_is_refused_by_all_and_nobody_is_fenced(
    sender, tmp_path, pool, monkeypatch
):
    receivers = serving_version_1(sender, tmp_path, pool, ["a", "b"])
    taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
    with monkeypatch.context() as patch:
        flip_on(patch, "sender", "ready", rank=0)
        with pytest.raises(BroadcastError, match=r"a \(.*refused.*checksum.*b \(.*refused"):
            sender.publish(weights(2), version=2)
    truth = expected(tmp_path, 1)
    assert [digest(a) for a in (sender._arenas[0], *(r._arena for r in receivers))] == [truth] * 3
    assert sender.publish(weights(2), version=2).served == ("a", "b")
    assert ["refused" in t.result().called_off[0] for t in taken] == [True, True]
    truth = expected(tmp_path, 2)
    assert [digest(a) for a in (sender._arenas[0], *(r._arena for r in receivers))] == [truth] * 3


def test_wrong_names_are_refused_before_a_round(sender, tmp_path, pool):
    (receiver,) = serving_version_1(sender, tmp_path, pool, ["a"])
    wrong = weights(2)
    del wrong["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 names are \(model.norm.weight\) missing"):
        sender.publish(wrong, version=2)
    with pytest.raises(TimeoutError, match=r"127.0.0.1:\d+ to begin round 2"):
        receiver.take(timeout_s=0.05)
    taken = pool.submit(receiver.take, timeout_s=SOON)
    assert sender.publish(weights(2), version=2).served == ("a",)
    assert taken.result().called_off == ()


def test_a_fault_of_the_sender_in_mid_round_reaches_the_receivers(
    sender, tmp_path, pool, monkeypatch
):
    (receiver,) = serving_version_1(sender, tmp_path, pool, ["a"])
    taken = pool.submit(receiver.take, timeout_s=SOON)

    def no_memory(*_):
        raise MemoryError("the trainer is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("kimi_core.weights.broadcast.sender.SlotWriter.make_ready", no_memory)
        with pytest.raises(MemoryError):
            sender.publish(weights(2), version=2)
    assert digest(sender._arenas[0]) == expected(tmp_path, 1)
    assert sender.publish(weights(2), version=2).served == ("a",)
    assert "MemoryError" in taken.result().called_off[0]


def test_one_who_does_not_answer_is_fenced_by_name_in_time(tmp_path, pool):
    settings = BroadcastSettings(bucket_bytes=4096, answer_s=3, transfer_s=20)
    with WeightSender([make_arena(tmp_path / "s")], host="127.0.0.1", settings=settings) as sender:
        there, absent = (member(sender, tmp_path / name, name) for name in ("there", "absent"))
        members_are(sender, ["there", "absent"])
        taken = pool.submit(there.take, timeout_s=SOON)
        published = sender.publish(weights(1), version=1)
        assert published.served == ("there",)
        why = published.fenced["absent"]
        assert why == "absent (tp rank 0, rank 2) silent: did not say 'ready' within 3 s"
        assert taken.result().called_off == (why,)
        with pytest.raises(Fenced, match="absent"):
            absent.take(timeout_s=SOON)
        assert absent._arena.active_version is None
        assert absent.join(timeout_s=SOON) == 1


def test_a_slot_that_no_reader_lets_go_is_named(sender, tmp_path, pool, monkeypatch):
    monkeypatch.setattr(sender, "settings", replace(QUICK, answer_s=4))
    (receiver,) = serving_version_1(sender, tmp_path, pool, ["a"])
    leases = []
    for version in (2, 3):
        leases.append(receiver._arena.acquire())
        taken = pool.submit(receiver.take, timeout_s=SOON)
        sender.publish(weights(version), version=version)
        taken.result()
    taken = pool.submit(receiver.take, timeout_s=SOON)
    with pytest.raises(BroadcastError, match=r"a \(.*refused: .*slots became free.*by pid"):
        sender.publish(weights(4), version=4)
    leases.pop().release()
    assert sender.publish(weights(4), version=4).served == ("a",)
    assert taken.result().version == 4


def test_a_sender_that_is_gone_is_named(tmp_path):
    sender = WeightSender([make_arena(tmp_path / "s")], host="127.0.0.1", settings=QUICK)
    receiver = member(sender, tmp_path / "r", "r")
    sender.close()
    with pytest.raises(PeerGone, match=re.escape(receiver.address)):
        receiver.take(timeout_s=SOON)
    with pytest.raises(PeerGone, match=f"No sender of weights answered at {receiver.address}"):
        Mailbox.connect(*sender.address, seconds=0.2)


def test_who_does_not_know_the_token_cannot_join(tmp_path, pool):
    token = b"0123456789abcdef"
    with WeightSender(
        [make_arena(tmp_path / "s")], host="127.0.0.1", settings=QUICK, token=token
    ) as sender:
        with pytest.raises(Refused, match="does not accept this token"):
            WeightReceiver(sender.address, make_arena(tmp_path / "a"), name="a", token=b"f" * 16)
        with socket.create_connection(sender.address) as stranger:
            stranger.sendall(bytes([120]) * 100)  # No greeting.
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        arena = make_arena(tmp_path / "r")
        receiver = WeightReceiver(sender.address, arena, name="r", token=token)
        receiver.join(timeout_s=SOON)
        for version in (1, 2):
            taken = pool.submit(receiver.take, timeout_s=SOON)
            assert sender.publish(weights(version), version=version).served == ("r",)
            assert taken.result().version == version
            assert digest(arena) == expected(tmp_path, version)
        assert sender.members == ["r"]
    with pytest.raises(PeerGone, match=re.escape(receiver.address)):
        receiver.take(timeout_s=SOON)
    with pytest.raises(PeerGone, match="No sender of weights answered"):
        Mailbox.connect(*sender.address, token, seconds=0.2)


def test_what_is_no_request_is_dropped(sender, tmp_path, caplog):
    box = Mailbox.connect(*sender.address)
    for junk in (b"{", b"[]", b'{"id": 1}', b"\xff"):
        box.store.queue_push("joins", junk)
    member(sender, tmp_path / "r", "r")
    assert caplog.text.count("malformed join request") == 4


def test_terms_and_arenas_are_checked(tmp_path):
    with pytest.raises(ValueError, match="backend = 'mpi'; allowed are 'gloo' and 'nccl'"):
        BroadcastSettings(backend="mpi")
    with pytest.raises(ValueError, match="answer_s = 0; it must be above 0"):
        BroadcastSettings(answer_s=0)
    with pytest.raises(ValueError, match="0 arenas at versions"):
        WeightSender([], host="127.0.0.1")
