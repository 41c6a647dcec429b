"""Weights between processes, some of which are killed or freeze in the middle of a transfer."""

import json
import queue
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from warm import Warm
from weights.broadcast.broadcast_fixtures import QUICK, digest, expected, make_arena, weights

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.broadcast.mailbox import PeerGone
from kimi_core.weights.broadcast.receiver import WeightReceiver
from kimi_core.weights.broadcast.rounds import BroadcastSettings
from kimi_core.weights.broadcast.sender import WeightSender

pytestmark = pytest.mark.slow

SOON = 120
"""Seconds within which a process has started and spoken, also on a busy machine."""
SETTINGS = BroadcastSettings(bucket_bytes=QUICK.bucket_bytes, answer_s=10, transfer_s=10)


class Host:
    """A process that runs ``hosts.py``."""

    def __init__(self, role: str, **given) -> None:
        script = str(Path(__file__).with_name("hosts.py"))
        self.process = Warm([script, role, json.dumps(given)])
        self.said: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hears(self, key: str):
        """The next thing it says, which is about ``key``."""
        event = self.said.get(timeout=SOON)
        assert event and key in event, event
        return event[key]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(SOON)

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.put(json.loads(line))
        self.said.put({})


class Reader(threading.Thread):
    """Reads an arena over and over: each version must be whole, and none older than the last."""

    def __init__(self, path: Path, truths: dict[int, str]) -> None:
        super().__init__(daemon=True)
        self.arena, self.truths = WeightArena.open(path), truths
        self.reads, self.faults = 0, []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        last = 0
        while not self.done.wait(0.01):  # The machine is for the others.
            version, found = digest(self.arena)
            if version < last or found != self.truths[version]:
                self.faults.append((last, version))
            last = version
            self.reads += 1

    def check(self) -> None:
        self.done.set()
        self.join(SOON)
        assert self.reads > 0 and self.faults == []


@pytest.fixture(autouse=True)
def _loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def hosts():
    started: list[Host] = []

    def start(role: str, **given) -> Host:
        started.append(Host(role, **given))
        return started[-1]

    yield start
    for host in started:
        host.end()


def new_arena(path: Path, **layout) -> str:
    make_arena(path, **layout).close()
    return str(path)


def served_by(path: str) -> tuple[int, str]:
    with WeightArena.open(path) as arena:
        return digest(arena)


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
@pytest.mark.nightly
def test_one_of_three_fails_midway(hosts, tmp_path, fault):
    """a and b serve version 1. In the middle of version 2, b is killed or freezes: a serves 1 until
    it serves 2, b 1 until it comes back and pulls 2, and nobody ever anything else."""
    truths = {version: expected(tmp_path, version)[1] for version in (1, 2, 3)}
    arenas = {name: new_arena(tmp_path / name) for name in "ab"}
    with WeightSender([make_arena(tmp_path / "s")], host="127.0.0.1", settings=SETTINGS) as sender:
        given = {"address": sender.address}
        a = hosts("receive", **given, arena=arenas["a"], name="a")
        assert a.hears("joined") is None
        b = hosts("receive", **given, arena=arenas["b"], name="b", fault=fault, version=2)
        assert b.hears("joined") is None
        assert sender.publish(weights(1), version=1).served == ("a", "b")
        assert (a.hears("taken"), b.hears("taken")) == (1, 1)
        readers = [Reader(Path(path), truths) for path in (*arenas.values(), tmp_path / "s")]

        started = time.monotonic()
        published = sender.publish(weights(2), version=2)
        seconds = time.monotonic() - started
        print(f"{fault}: version 2 served after {seconds:.2f} s")
        assert published.served == ("a",)
        named = r"b \(tp rank 0, rank 2\) silent: did not say 'vote' within 10 s"
        assert re.search(named, published.fenced["b"])
        # The bytes' limit, where nobody hangs up, and that of the votes.
        assert seconds < SETTINGS.answer_s + (SETTINGS.transfer_s if fault == "SIGSTOP" else 0) + 20
        event = a.said.get(timeout=SOON)
        assert event["taken"] == 2 and re.search(named, event["called_off"][0])
        assert served_by(arenas["a"]) == served_by(str(tmp_path / "s")) == (2, truths[2])
        assert served_by(arenas["b"]) == (1, truths[1])

        if fault == "SIGKILL":
            assert b.process.wait(SOON) == -signal.SIGKILL
            b = hosts("receive", **given, arena=arenas["b"], name="b")
        else:
            b.process.send_signal(signal.SIGCONT)
            assert re.search(named, b.hears("fenced"))
        assert b.hears("joined") == 2
        assert served_by(arenas["b"]) == (2, truths[2])
        assert sender.publish(weights(3), version=3).served == ("a", "b")
        assert (a.hears("taken"), b.hears("taken")) == (3, 3)
        for reader in readers:
            reader.check()


@pytest.mark.nightly
def test_a_shard_that_fails_holds_back_the_others(hosts, tmp_path):
    """Rank 1's only receiver is killed midway: rank 0's does not serve what rank 1's has not got,
    until rank 1's is fenced."""
    senders = [make_arena(tmp_path / f"s{rank}", tp_rank=rank, tp_size=2) for rank in range(2)]
    truths = [expected(tmp_path, 2, tp_rank=rank, tp_size=2) for rank in range(2)]
    paths = [new_arena(tmp_path / f"r{rank}", tp_rank=rank, tp_size=2) for rank in range(2)]
    with WeightSender(senders, host="127.0.0.1", settings=SETTINGS) as sender:
        faults = [{}, {"fault": "SIGKILL", "version": 2}]
        ranks = [
            hosts("receive", address=sender.address, arena=paths[r], name=f"r{r}", tp_rank=r, **f)
            for r, f in enumerate(faults)
        ]
        assert [rank.hears("joined") for rank in ranks] == [None, None]
        assert set(sender.publish(weights(1), version=1).served) == {"r0", "r1"}
        assert [rank.hears("taken") for rank in ranks] == [1, 1]
        published = sender.publish(weights(2), version=2)
        assert published.served == ("r0",)
        assert "r1 (tp rank 1, rank 1) silent" in published.fenced["r1"]
        event = ranks[0].said.get(timeout=SOON)
        assert event["taken"] == 2 and "r1 (tp rank 1, rank 1)" in event["called_off"][0]
        assert served_by(paths[0]) == truths[0] and served_by(paths[1])[0] == 1
        again = hosts("receive", address=sender.address, arena=paths[1], name="r1", tp_rank=1)
        assert again.hears("joined") == 2
        assert served_by(paths[1]) == truths[1]


def test_the_sender_is_killed_midway(hosts, tmp_path):
    """Its receivers name it in time, and they and its own arena serve what they served."""
    path = new_arena(tmp_path / "s")
    truth = expected(tmp_path, 1)
    host = hosts("send", arena=path, members=2, settings=asdict(SETTINGS), fault="SIGKILL")
    address = tuple(host.hears("address"))
    receivers = [WeightReceiver(address, make_arena(tmp_path / n), name=n) for n in "ab"]
    for receiver in receivers:
        assert receiver.join(timeout_s=SOON) is None
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
        while not all(t.done() for t in taken):
            host.process.stdin.write("\n")
            host.process.stdin.flush()
            time.sleep(0.05)
        assert [t.result().version for t in taken] == [1, 1]
        started = time.monotonic()
        taken = [pool.submit(r.take, timeout_s=SOON) for r in receivers]
        for future in taken:
            with pytest.raises(PeerGone, match=f"sender at 127.0.0.1:{address[1]} is gone"):
                future.result(timeout=SOON)
    assert time.monotonic() - started < SETTINGS.transfer_s + 2 * SETTINGS.answer_s
    assert host.process.wait(SOON) == -signal.SIGKILL
    assert [digest(r._arena) for r in receivers] == [truth, truth]
    assert served_by(path) == truth
