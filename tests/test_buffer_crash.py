"""What the buffer guarantees when processes die or files are damaged.

The tests kill a writer with signal 9 at random moments, read while a writer evicts, and damage
files.

    KIMI_KILLS=1000 pytest tests/test_buffer_crash.py      # the long mode; 100 kills otherwise
"""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from buffer_testing import is_whole, tokens
from forked import in_child

from kimi_core._C import crc32c
from kimi_core.buffer import RolloutBuffer, main

KILLS = int(os.environ.get("KIMI_KILLS", "100"))
READS = 10_000
SIZES = {"capacity_tokens": 60_000, "max_trajectories": 60, "page_tokens": 64}


BEGUN, APPENDED, EVICTING, FLUSHED, SNAPPED = range(5)


class Acknowledgements:
    """A log outside the buffer of what the writer was told is done, one record for each call."""

    RECORD = struct.Struct("qqq8x")
    """32 bytes, so that none crosses a page: a kill may cut a write between two pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.bytes_read = 0

    def write(self, *record: int) -> None:
        os.write(self.handle, self.RECORD.pack(*record))

    def has_more(self) -> bool:
        return self.path.stat().st_size > self.bytes_read

    def read_more(self) -> list[tuple[int, int, int]]:
        """Return what was written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.bytes_read)
            found = file.read()
        self.bytes_read += len(found)
        return list(self.RECORD.iter_unpack(found))


def write_for_ever(path: Path, log: Acknowledgements, seed: int) -> None:
    """Do random work and log each step after it is done; log evictions before."""
    rng = random.Random(seed)
    buffer = RolloutBuffer.open(path)
    assert buffer.recovery["cuts"] == [] and buffer.recovery["slots_lost"] == 0
    lengths = {info.trajectory_id: info.length for info in buffer.trajectories()}
    while True:
        step = rng.random()
        if len(lengths) < 50:
            key = buffer.begin(0, 0)
            lengths[key] = 0
            log.write(BEGUN, key, 0)
        elif step < 0.1 or buffer.stats().pages_free < 50:
            gone = rng.sample(list(lengths), 3)
            for key in gone:
                log.write(EVICTING, key, 0)
                del lengths[key]
            buffer.evict(gone)
        elif step < 0.12:
            buffer.flush()
            log.write(FLUSHED, 0, 0)
        elif step < 0.14:
            buffer.snapshot(str(path) + ".copy")
            log.write(SNAPPED, 0, 0)
        elif step < 0.6:
            key = rng.choice(list(lengths))
            end = lengths[key] + rng.randrange(1, 300)
            given = tokens(key, lengths[key], end)
            lengths[key] = buffer.append(key, *given, policy_version=end)
            log.write(APPENDED, key, end)
        else:
            keys = rng.sample(list(lengths), 4)
            ends = [lengths[key] + rng.randrange(1, 90) for key in keys]
            parts = [tokens(k, lengths[k], end) for k, end in zip(keys, ends, strict=True)]
            columns = (np.concatenate(column) for column in zip(*parts, strict=True))
            cu_seqlens = np.cumsum([0, *(len(ids) for ids, _, _ in parts)], dtype=np.int32)
            versions = np.array(ends, np.int32)
            buffer.append_many(np.array(keys), *columns, cu_seqlens, versions)
            for key, end in zip(keys, ends, strict=True):
                lengths[key] = end
                log.write(APPENDED, key, end)


@pytest.mark.nightly
def test_kill_9_loses_and_tears_nothing(tmp_path):
    path, rng = tmp_path / "buffer.bin", random.Random(os.getpid())
    RolloutBuffer.create(path, **SIZES).close()
    log = Acknowledgements(tmp_path / "log")
    lost = torn = doubled = snapshots = 0
    acknowledged: dict[int, int] = {}
    evicting = set()
    steps = [0] * 5
    for kill in range(KILLS):
        pid = in_child(write_for_ever, path, log, kill)
        # The child opens the file, which takes a while on a busy machine, then works 1 to 60 ms.
        while not log.has_more():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the writer ended by itself"
        time.sleep(rng.uniform(0.001, 0.060))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL

        for kind, key, length in log.read_more():
            steps[kind] += 1
            if kind in (BEGUN, APPENDED):
                acknowledged[key] = length
            elif kind == EVICTING:
                evicting.add(key)
        with RolloutBuffer.open(path, readonly=True) as found:
            there = {info.trajectory_id: info.length for info in found.trajectories()}
            lost += sum(
                there.get(key, -1) < length
                for key, length in acknowledged.items()
                if key not in evicting
            )
            torn += sum(not is_whole(found.read(key), key) for key in there)
            for key in there:  # A segment's version says where it ends.
                doubled += any(s + n != end for s, n, end in found.segments(key))
        copy = Path(f"{path}.copy")
        if copy.exists():
            with RolloutBuffer.open(copy) as found:
                assert found.recovery["cuts"] == []
                torn += sum(not is_whole(found.read(key), key) for key in found.unfinished())
            copy.unlink()
            snapshots += 1
    print(
        f"{KILLS} kills, {sum(steps)} acknowledgements ({steps[FLUSHED]} flushes, "
        f"{steps[SNAPPED]} snapshots, {steps[EVICTING]} evictions): "
        f"{lost} lost, {torn} torn, {doubled} doubled"
    )
    assert (lost, torn, doubled) == (0, 0, 0)
    assert min(steps) > KILLS // 20
    assert snapshots > KILLS // 20


def churn(path: Path) -> None:
    """Evict and append as fast as possible, so that pages are reused all the time."""
    rng = random.Random(0)
    buffer = RolloutBuffer.open(path)
    lengths: dict[int, int] = {}
    while True:
        if len(lengths) < 30:
            lengths[buffer.begin(0, 0)] = 0
        elif rng.random() < 0.3:
            buffer.evict([key := rng.choice(list(lengths))])
            del lengths[key]
        key = rng.choice(list(lengths))
        if lengths[key] < 1500:
            end = lengths[key] + rng.randrange(1, 200)
            buffer.append(key, *tokens(key, lengths[key], end), policy_version=0)
            lengths[key] = end


def test_a_reader_sees_nothing_torn_while_a_writer_evicts(tmp_path):
    path = tmp_path / "buffer.bin"
    RolloutBuffer.create(path, **SIZES).close()
    pid = in_child(churn, path)
    whole = gone = torn = 0
    try:
        with RolloutBuffer.open(path, readonly=True) as buffer:
            while whole < READS or gone < 100:
                assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the writer ended by itself"
                for info in buffer.trajectories():
                    try:
                        found = buffer.read(info.trajectory_id)
                    except KeyError:
                        gone += 1
                        continue
                    whole += is_whole(found, info.trajectory_id)
                    torn += not is_whole(found, info.trajectory_id)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"{whole} reads whole, {gone} evicted meanwhile, {torn} torn")
    assert torn == 0


@pytest.fixture
def filled(tmp_path) -> Path:
    """A file with a finished trajectory of 200 tokens in four segments."""
    path = tmp_path / "buffer.bin"
    with RolloutBuffer.create(path, **SIZES) as buffer:
        key = buffer.begin(7, 3)
        for part in range(4):
            end = 50 * (part + 1)
            buffer.append(key, *tokens(key, 50 * part, end), policy_version=part)
        buffer.finish(key, "stop")
    return path


def spoil(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, b"PKZIP", "is not a rollout buffer"),
        (8, b"\x03", r"format version 3, .*reads up to 2"),
        (20, b"\xff", "damaged header"),
        (40, b"\xff", "damaged header"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(filled, at, value, complaint):
    spoil(filled, at, value)
    for readonly in (True, False):
        with pytest.raises(ValueError, match=complaint):
            RolloutBuffer.open(filled, readonly=readonly)


def test_a_truncated_file_is_cut_or_refused(filled):
    """Missing pages cut the trajectories that had them. A file without all its slots is refused."""
    os.truncate(filled, filled.stat().st_size - 1)
    with (
        RolloutBuffer.open(filled, readonly=True) as buffer,
        pytest.raises(ValueError, match="trajectory 0 fails its checksum from token"),
    ):
        buffer.read(0)
    with RolloutBuffer.open(filled) as buffer:
        assert buffer.recovery["cuts"] == [(0, 150, 50)]
        assert is_whole(buffer.read(0), 0)
        buffer.append(0, *tokens(0, 150, 1000), policy_version=9)
        assert is_whole(buffer.read(0), 0)
    os.truncate(filled, 30_000)
    with pytest.raises(ValueError, match="is cut off: it has 30000 of 36864 bytes"):
        RolloutBuffer.open(filled)
    os.truncate(filled, 0)
    with pytest.raises(ValueError, match="is not a rollout buffer"):
        RolloutBuffer.open(filled, readonly=True)


def test_a_file_of_version_1_has_all_its_pages_and_is_used_as_it_is(filled, tmp_path):
    """Files of version 1 were as long from the start as they could get."""
    most = RolloutBuffer.file_bytes(**SIZES)
    os.truncate(filled, most)
    header = filled.read_bytes()[:32]
    header = header[:8] + struct.pack("<I", 1) + header[12:]
    spoil(filled, 0, header + struct.pack("<I", crc32c(header)))
    with RolloutBuffer.open(filled) as buffer:
        assert buffer.stats().pages_allocated == buffer.stats().pages
        key = buffer.begin(8, 4)
        buffer.append(key, *tokens(key, 0, 1000), policy_version=0)
        buffer.snapshot(tmp_path / "copy.bin")
        assert is_whole(buffer.read(0), 0) and is_whole(buffer.read(key), key)
    assert filled.stat().st_size == (tmp_path / "copy.bin").stat().st_size == most
    with RolloutBuffer.open(tmp_path / "copy.bin", readonly=True) as copy:
        assert is_whole(copy.read(key), key)
    os.truncate(filled, most - 1)
    with pytest.raises(ValueError, match=f"is cut off: it has {most - 1} of {most} bytes"):
        RolloutBuffer.open(filled)


def test_a_flipped_bit_is_an_error_for_readers_and_a_stated_cut_for_the_writer(filled):
    expected = tokens(0, 0, 200)[0][120:121].tobytes()
    at = filled.read_bytes().index(expected)
    spoil(filled, at, bytes([expected[0] ^ 16]))
    with (
        RolloutBuffer.open(filled, readonly=True) as buffer,
        pytest.raises(ValueError, match="trajectory 0 fails its checksum from token 100;"),
    ):
        buffer.read(0)
    with RolloutBuffer.open(filled) as buffer:
        assert buffer.recovery["cuts"] == [(0, 100, 100)]
        found = buffer.read(0)
        assert (len(found.token_ids), found.end_reason, found.prompt_id) == (100, None, 7)
        assert is_whole(found, 0)
        buffer.append(0, *tokens(0, 100, 130), policy_version=9)
    with RolloutBuffer.open(filled) as buffer:
        assert buffer.recovery["cuts"] == []
        assert is_whole(buffer.read(0), 0)


def test_the_inspect_command_while_a_writer_has_the_file(filled, capsys):
    with RolloutBuffer.open(filled) as buffer:
        buffer.append(buffer.begin(1, 1), *tokens(1, 0, 5), policy_version=-1)
        assert main([str(filled)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 60 trajectories, 1 unfinished; 205 tokens in 5 segments" in shown
    assert "933 of 938 pages of 64 tokens free" in shown
    assert "policy version 0, age 3: 50 tokens" in shown
    assert "trajectory 0, prompt 7, group 3: 200 tokens (version 0: 50, version 1: 50" in shown
    assert "trajectory 1, prompt 1, group 1: 5 tokens (prompt: 5), open; checksums ok" in shown

    spoil(filled, filled.read_bytes().index(tokens(0, 0, 200)[0][120:124].tobytes()), b"\xff")
    before = filled.read_bytes()
    assert main([str(filled)]) == 1
    assert "stop; DAMAGED: " in capsys.readouterr().out
    assert filled.read_bytes() == before


def test_the_inspect_command_is_a_module(filled, tmp_path):
    command = [sys.executable, "-m", "kimi_core.buffer"]
    done = subprocess.run([*command, filled], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checksums ok" in done.stdout
    missing = [*command, tmp_path / "none"]
    done = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: [Errno 2] Cannot open" in done.stderr
