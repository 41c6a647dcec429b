"""Large buffers, and files that grow: kills meanwhile, readers meanwhile, and full disks."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from buffer_model import COLUMNS
from buffer_testing import is_whole, tokens
from forked import in_child

from kimi_core.buffer import RolloutBuffer

KILLS = int(os.environ.get("KIMI_KILLS", "100")) // 2
LARGE = {"capacity_tokens": 20_000_000, "max_trajectories": 64}
"""180 MB if it is full."""


def test_a_whole_long_context(tmp_path):
    """131,072 tokens in 512 partial segments, more than a slot lists itself."""
    taken = RolloutBuffer.tokens_taken(131_072, 512)
    path = tmp_path / "buffer.bin"
    with RolloutBuffer.create(path, capacity_tokens=taken, max_trajectories=1) as buffer:
        whole = tokens(0, 0, 131_072)
        key = buffer.begin(0, 0)
        for part in range(512):
            at = slice(256 * part, 256 * (part + 1))
            end = buffer.append(key, *(c[at] for c in whole), policy_version=part)
        assert end == 131_072
        assert buffer.stats().pages_free == 0
        with pytest.raises(ValueError, match="Cannot append 1 tokens: they take"):
            buffer.append(key, *tokens(0, 0, 1), policy_version=0)
    with RolloutBuffer.open(path) as buffer:
        found = buffer.read(key)
        for name, column in zip(COLUMNS, whole, strict=False):
            np.testing.assert_array_equal(getattr(found, name), column)
        np.testing.assert_array_equal(found.policy_versions, np.arange(512).repeat(256))


def test_ten_thousand_trajectories(tmp_path):
    path, n = tmp_path / "buffer.bin", 10_000
    sizes = {"capacity_tokens": n * 64, "max_trajectories": n, "page_tokens": 64}
    with RolloutBuffer.create(path, **sizes) as buffer:
        for key in range(n):
            assert buffer.begin(key // 8, key // 8) == key
        ends = np.arange(n + 1, dtype=np.int32) * 5
        many = np.arange(n), *tokens(0, 0, 5 * n), ends, np.zeros(n, np.int32)
        assert buffer.append_many(*many).tolist() == [5] * n
        with pytest.raises(ValueError, match="all 10000 are in use"):
            buffer.begin(0, 0)
        buffer.evict(list(range(0, n, 2)))
        assert [buffer.begin(0, 0) for _ in range(3)] == [n, n + 1, n + 2]
    with RolloutBuffer.open(path) as buffer:
        assert len(buffer.unfinished()) == n // 2 + 3
        np.testing.assert_array_equal(buffer.read(9_999).token_ids, tokens(0, 0, 5 * n)[0][-5:])


def grow_for_ever(path: Path, log: int, seed: int) -> None:
    """Append as fast as possible; log each acknowledgement after it was given."""
    rng = random.Random(seed)
    buffer = RolloutBuffer.open(path)
    assert buffer.recovery["cuts"] == [] and buffer.recovery["slots_lost"] == 0
    lengths = {info.trajectory_id: info.length for info in buffer.trajectories()}
    while len(lengths) < LARGE["max_trajectories"]:
        lengths[buffer.begin(0, 0)] = 0
    while True:
        key = rng.choice(list(lengths))
        end = lengths[key] + rng.randrange(1, 30_000)
        lengths[key] = buffer.append(key, *tokens(key, lengths[key], end), policy_version=0)
        os.write(log, key.to_bytes(8, "little") + end.to_bytes(8, "little"))


@pytest.mark.nightly
def test_kill_9_while_the_file_grows_loses_nothing(tmp_path):
    """A reader from before the first page sees every acknowledged token after each kill."""
    path, rng = tmp_path / "buffer.bin", random.Random(os.getpid())
    lost = torn = grown = acknowledgements = 0
    for kill in range(KILLS):
        if kill % 5 == 0:
            path.unlink(missing_ok=True)
            RolloutBuffer.create(path, **LARGE).close()
            early, acknowledged = RolloutBuffer.open(path, readonly=True), {}
        before = path.stat().st_size
        reading, writing = os.pipe()
        pid = in_child(grow_for_ever, path, writing, kill)
        os.close(writing)
        first = os.read(reading, 16)
        time.sleep(rng.uniform(0.001, 0.060))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        with os.fdopen(reading, "rb") as log:
            pairs = np.frombuffer(first + log.read(), np.int64).reshape(-1, 2)
        acknowledged.update(pairs.tolist())
        acknowledgements += len(pairs)
        grown += path.stat().st_size > before
        there = {info.trajectory_id: info.length for info in early.trajectories()}
        lost += sum(there.get(key, -1) < end for key, end in acknowledged.items())
        torn += sum(not is_whole(early.read(key), key) for key in there)
    print(f"{KILLS} kills, {grown} files grew, {acknowledgements} acknowledgements")
    assert (lost, torn) == (0, 0)
    assert grown > KILLS // 2


def test_a_reader_in_another_process_follows_a_growing_file(tmp_path):
    path = tmp_path / "buffer.bin"
    RolloutBuffer.create(path, **LARGE).close()
    with RolloutBuffer.open(path, readonly=True) as early:
        assert early.stats().pages_allocated == 0
        reading, writing = os.pipe()
        pid = in_child(grow_for_ever, path, writing, 0)
        os.close(writing)
        sizes = set()
        try:
            while len(sizes) < 5:
                assert os.read(reading, 1 << 16), "the writer ended by itself"
                sizes.add(early.stats().pages_allocated)
                for info in early.trajectories():
                    assert is_whole(early.read(info.trajectory_id), info.trajectory_id)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)


def test_a_buffer_takes_little_until_it_is_used(tmp_path):
    """The size of 256 x 8 responses of 131,072 tokens with a budget of 2,048: 158 GB at most."""
    sizes = {"capacity_tokens": 17_584_619_520, "max_trajectories": 133_120}
    path = tmp_path / "buffer.bin"
    with RolloutBuffer.create(path, **sizes) as buffer:
        assert RolloutBuffer.file_bytes(**sizes) > 158e9
        fixed = path.stat().st_size
        assert fixed < 69e6
        key = buffer.begin(0, 0)
        buffer.append(key, *tokens(key, 0, 131_072), policy_version=0)
        assert path.stat().st_blocks * 512 < fixed + 10 * 131_072 + 1_000_000
        assert buffer.stats().pages_free == buffer.stats().pages - 513
        assert is_whole(buffer.read(key), key)


FILL = """
import errno, os, sys
sys.path[:0] = sys.argv[2:]
from buffer_testing import is_whole, tokens
from kimi_core.buffer import RolloutBuffer

path = sys.argv[1] + "/buffer.bin"
try:
    RolloutBuffer.create(path + ".big", capacity_tokens=1, max_trajectories=20_000)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert os.listdir(sys.argv[1]) == []
buffer = RolloutBuffer.create(path, capacity_tokens=10_000_000, max_trajectories=200)
said, length = None, {}
while not said:
    key = buffer.begin(0, 0)
    try:
        for start in range(0, 9_000, 3_000):
            length[key] = start
            buffer.append(key, *tokens(key, start, start + 3_000), policy_version=0)
        length[key] = 9_000
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        said = str(error)
for key, expected in length.items():
    found = buffer.read(key)
    assert len(found.token_ids) == expected and is_whole(found, key)
buffer.evict([0])
buffer.append(key, *tokens(key, length[key], length[key] + 3_000), policy_version=0)
assert is_whole(buffer.read(key), key)
buffer.close()
buffer = RolloutBuffer.open(path)
assert buffer.recovery["cuts"] == [] and len(buffer.finished() + buffer.unfinished()) == key
print(said)
"""


def on_a_small_disk(folder: Path, script: str) -> subprocess.CompletedProcess:
    """Run a script whose first argument is a file system of 4 MB that only the script sees."""
    mount = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("cannot mount a file system here: no unshare, or no user namespaces")
    here = Path(__file__).parent
    places = (str(folder), str(here), str(here.parent))
    return subprocess.run(
        [*command, sys.executable, "-c", script, *places],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    done = on_a_small_disk(tmp_path, FILL)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"[Errno {errno.ENOSPC}] Cannot allocate bytes " in done.stdout
    assert "are free on the disk: free some, or use a larger disk) for " in done.stdout
