"""kill -9 of the publisher, and of readers, at any moment: nothing is torn, no version goes back.

KIMI_KILLS=300 pytest -s tests/weights/test_arena_crash.py     # the long mode; 40 kills otherwise
"""

import os
import random
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import transformers as hf
from forked import in_child

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.layout import Layout

KILLS = int(os.environ.get("KIMI_KILLS", "40"))
READERS = 2
RECORD = struct.Struct("qqqq")
PATIENCE_S = 60


@pytest.fixture(scope="module")
def large() -> Layout:
    """6 MB a slot, so that most kills come while one is being written."""
    config = hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Layout.from_config(config, dtype="float32")


def kill(pid: int) -> None:
    """Also says if the process had come to an end of its own."""
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def append(path: Path, *record: int) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(handle, RECORD.pack(*record))
    os.close(handle)


def records(path: Path) -> list[tuple[int, int, int, int]]:
    return list(RECORD.iter_unpack(path.read_bytes())) if path.exists() else []


def publish_for_ever(path: Path, layout: Layout, log: Path) -> None:
    """Each version is its number everywhere; acknowledged when ``publish`` has returned."""
    with WeightArena.open(path, readonly=False) as arena:
        version = -1 if arena.active_version is None else arena.active_version
        while True:
            version += 1
            weights = {
                part.name: np.full(part.whole, version, np.float32)
                for entry in layout.entries
                for part in entry.parts
            }
            append(log, version, 0, 0, 0)  # Begun, then published.
            arena.publish(weights, version=version, deadline_s=PATIENCE_S, threads=2)
            append(log, version, 1, 0, 0)


def read_for_ever(path: Path, log: Path) -> None:
    """Counts leases, those torn, and those older than the one before."""
    newest = -1
    with WeightArena.open(path) as arena:
        while True:
            lease = arena.acquire()
            torn = 0
            for _ in range(2):  # It stays what it is.
                try:
                    lease.verify(threads=1)
                except ValueError:
                    torn = 1
                for entry in lease.layout.entries:
                    values = lease.payload[entry.offset : entry.offset + entry.nbytes]
                    torn |= not (values.view(np.float32) == lease.version).all()
            append(log, lease.version, torn, lease.version < newest, 0)
            newest = lease.version
            lease.release()


def wait_for(log: Path, count: int, *pids: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while len(records(log)) < count:
        assert time.monotonic() < ends, f"{log.name} has {len(records(log))} of {count} records"
        for pid in pids:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"{log.name} ended by itself"


@pytest.mark.nightly
def test_kill_9_of_the_publisher_tears_nothing(arena_path, large, tmp_path):
    rng = random.Random(os.getpid())
    WeightArena.create(arena_path, large).close()
    published, read = tmp_path / "published", tmp_path / "read"
    publisher = in_child(publish_for_ever, arena_path, large, published)
    wait_for(published, 2, publisher)
    readers = [in_child(read_for_ever, arena_path, read) for _ in range(READERS)]
    torn = backwards = unfinished = readers_killed = 0
    served = -1
    try:
        for round_ in range(KILLS):
            wait_for(read, 2 * (round_ + 1), *readers)
            time.sleep(rng.uniform(0, 0.03))
            kill(publisher)
            publisher = 0
            number, done, _, _ = records(published)[-1]
            unfinished += not done
            with WeightArena.open(arena_path) as arena, arena.acquire() as lease:
                lease.verify()
                torn += not (lease.tensors["model.norm.weight"] == lease.version).all()
                backwards += lease.version < max(served, number - (not done))
                assert lease.version <= number
                served = lease.version
            if round_ % 4 == 3:  # A reader, too, most likely with a lease.
                kill(readers.pop(0))
                readers_killed += 1
                readers.append(in_child(read_for_ever, arena_path, read))
            before = len(records(published))
            publisher = in_child(publish_for_ever, arena_path, large, published)
            wait_for(published, before + 4, publisher)  # Two more, whatever the dead have held.
    finally:
        for pid in [publisher, *readers]:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    leases = records(read)
    torn += sum(record[1] for record in leases)
    backwards += sum(record[2] for record in leases)
    versions = sum(record[1] for record in records(published))
    print(
        f"{KILLS} kills of the publisher ({unfinished} within a publish), {readers_killed} of "
        f"readers; {versions} versions, {len(leases)} leases checked twice: {torn} torn, "
        f"{backwards} went back"
    )
    assert (torn, backwards) == (0, 0)
    assert unfinished > KILLS // 10
    with WeightArena.open(arena_path, readonly=False) as arena:
        assert arena._core._holders() == []  # What the dead had leased was taken away.


def hold(path: Path, log: Path) -> None:
    lease = WeightArena.open(path).acquire()
    append(log, lease.version, 0, 0, 0)
    signal.pause()


def test_the_lease_of_a_killed_reader_is_taken_away(arena_path, layout, tmp_path):
    def publish(version: int) -> None:
        weights = {
            part.name: np.full(part.whole, version, np.float32)
            for entry in layout.entries
            for part in entry.parts
        }
        arena.publish(weights, version=version, deadline_s=0)

    with WeightArena.create(arena_path, layout, slots=2) as arena:
        publish(0)
        for version in range(1, 6):
            log = tmp_path / str(version)
            pid = in_child(hold, arena_path, log)
            wait_for(log, 1, pid)
            publish(version)
            with pytest.raises(TimeoutError, match=rf"\(version {version - 1}\) by pid {pid}"):
                publish(version + 1)
            kill(pid)
        publish(6)
        assert arena._core._holders() == []
