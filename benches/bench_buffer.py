"""The rollout buffer compared with memcpy and with the stores that one might use instead.

    pip install '.[bench]' && pytest benches/bench_buffer.py      # half a minute

The work is the report's. Trajectories have lognormal lengths and are appended in segments of 256
tokens, interleaved over 64 open ones. They are then packed at random, 64 at a time. Every peer
stores the same four columns, and its contents are compared with the source after the clock has
stopped.

Speed is in tokens per microsecond of CPU time of this process, kernel time included. Rounds of ours
and of the peers alternate, and the best round of each counts, because a busy machine only ever
slows a round down.

memcpy is the physical limit: the same bytes, read from the same place as ours. Appends into pages
that an eviction has freed are compared with memcpy into warm memory. Appends that make the file
grow are compared with memcpy into a new file, whose pages the kernel must provide, too. Other peers
are populated when they are created, if they can be, while ours grows.

Short rows have 2,000 tokens on average. Long ones have 131,072 each, the report's longest context.
"""

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buffer_peers import (
    CONTEXT,
    NAMES,
    OPEN,
    PAYLOAD,
    SEGMENT,
    Lists,
    Lmdb,
    Memmap,
    Ours,
    TorchRl,
    Work,
)

from kimi_core.buffer import RolloutBuffer

pytestmark = pytest.mark.usefixtures("one_thread")

TRAJECTORIES = 10_000
ROUNDS = 3
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux."""


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(TRAJECTORIES)


@pytest.fixture(scope="module")
def long() -> Work:
    """About as many tokens, in rows of 131,072; packs of a million tokens."""
    return Work(160, length=CONTEXT, packed=8)


@pytest.fixture(scope="module")
def less() -> Work:
    """Less work, for peers that would take hours. Speeds per token stay comparable."""
    return Work(100)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="bench-buffer-"))
    yield path
    shutil.rmtree(path)


def cpu_us(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return 1e6 * (time.process_time() - started)


def version_of(start: int) -> int:
    return start // SEGMENT


def fill(peer: Any, work: Work) -> float:
    """Append everything, one call for each segment; returns tokens/µs."""
    given = [(k, work.columns(k, a, b), version_of(a)) for k, a, b in work.segments]

    def run() -> None:
        for key, columns, version in given:
            peer.append(key, columns, version)

    return work.tokens / cpu_us(run)


def steps_of(work: Work) -> list[tuple[np.ndarray, ...]]:
    """The arguments of ``append_many``, 64 segments in each call.

    An engine that samples many responses at once has them end to end already, so preparing them is
    not timed.
    """
    calls = []
    for first in range(0, len(work.segments), OPEN):
        step = work.segments[first : first + OPEN]
        columns = zip(*(work.columns(*segment) for segment in step), strict=True)
        ends = np.cumsum([0, *(b - a for _, a, b in step)], dtype=np.int32)
        versions = np.array([version_of(a) for _, a, _ in step], np.int32)
        keys = np.array([k for k, _, _ in step])
        calls.append((keys, *(np.concatenate(column) for column in columns), ends, versions))
    return calls


def fill_by_steps(ours: Ours, work: Work, calls: list[tuple[np.ndarray, ...]]) -> float:
    """Append everything, 64 segments in each call; returns tokens/µs."""

    def run() -> None:
        for keys, *rest in calls:
            ours.buffer.append_many(keys + ours.first, *rest)

    return work.tokens / cpu_us(run)


def pack_all(peer: Any, work: Work) -> float:
    """Pack everything; returns tokens/µs."""
    packs = [keys % len(work.lengths) for keys in work.packs]
    spent = cpu_us(lambda: [peer.pack(keys) and None for keys in packs])
    return sum(int(work.lengths[keys].sum()) for keys in packs) / spent


def check(peer: Any, work: Work) -> None:
    for keys in work.packs[:3]:
        batch = peer.pack(keys)
        assert batch.lengths.tolist() == work.lengths[keys].tolist()
        for key, start, end in zip(keys, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            for name, column in zip(NAMES, work.columns(key, 0, end - start), strict=False):
                np.testing.assert_array_equal(getattr(batch, name)[start:end], column)
            versions = np.arange(end - start) // SEGMENT
            np.testing.assert_array_equal(batch.policy_versions[start:end], versions)


def memcpy_in(work: Work) -> float:
    """Copy the payload, in pieces of a segment's size, into warm memory that holds all of it."""
    target = np.ones(PAYLOAD * work.tokens, np.uint8)
    source = np.ones(PAYLOAD * 2 * work.longest, np.uint8)
    pieces, at = [], 0
    for key, start, end in work.segments:
        size, begin = PAYLOAD * (end - start), PAYLOAD * (key % work.longest + start)
        pieces.append((target[at : at + size], source[begin : begin + size]))
        at += size

    def run() -> None:
        for to, given in pieces:
            to[...] = given

    return work.tokens / cpu_us(run)


def memcpy_steps(work: Work, calls: list[tuple[np.ndarray, ...]]) -> float:
    """Copy the columns of each call from where ``append_many`` reads them into warm memory."""
    pieces = pieces_of(calls, np.ones(PAYLOAD * work.tokens, np.uint8))
    return work.tokens / cpu_us(lambda: copy(pieces))


def memcpy_to_new_file(work: Work, calls: list[tuple[np.ndarray, ...]], path: Path) -> float:
    """Copy the columns of each call into the mapping of a new file.

    Its pages are provided first, in one call, which is part of the work.
    """
    size = PAYLOAD * work.tokens
    with path.open("w+b") as file:
        file.truncate(size)
        mapping = mmap.mmap(file.fileno(), size)
        pieces = pieces_of(calls, np.frombuffer(mapping, np.uint8))

        def run() -> None:
            os.posix_fallocate(file.fileno(), 0, size)
            mapping.madvise(POPULATE_WRITE)
            copy(pieces)

        return work.tokens / cpu_us(run)


def pieces_of(
    calls: list[tuple[np.ndarray, ...]], target: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where each column of each call goes, end to end, and the column."""
    columns = [column.view(np.uint8) for call in calls for column in call[1:4]]
    ends = np.cumsum([column.nbytes for column in columns])
    assert ends[-1] == len(target)
    return list(zip(np.split(target, ends[:-1]), columns, strict=True))


def copy(pieces: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for to, given in pieces:
        to[...] = given


def memcpy_out(work: Work) -> float:
    """Copy the bytes of all packs, trajectory by trajectory, into the same memory each time."""
    stored = np.ones(13 * work.tokens, np.uint8)
    starts = 13 * np.cumsum([0, *work.lengths])
    target = np.ones(13 * max(int(work.lengths[keys].sum()) for keys in work.packs), np.uint8)

    def run() -> None:
        for keys in work.packs:
            at = 0
            for key in keys:
                size = 13 * work.lengths[key]
                target[at : at + size] = stored[starts[key] : starts[key] + size]
                at += size

    return sum(int(work.lengths[keys].sum()) for keys in work.packs) / cpu_us(run)


def missing(ratios, name: str, peer: str, error: ImportError) -> None:
    ratios.record(name, peer, float("nan"), detail=f"MISSING: {error}; pip install '.[bench]'")


LIMITS = {"append_many": "memcpy", "append_many, growing": "memcpy to a new file", "pack": "memcpy"}


def measure(work: Work, folder: Path) -> dict[str, float]:
    """One round on a new buffer: tokens/µs of each of ``LIMITS`` and of its peer; bytes a token."""
    ours, calls, path = Ours(work, folder), steps_of(work), folder / "ours.bin"
    speeds = {"append_many, growing": fill_by_steps(ours, work, calls)}
    speeds["limit append_many, growing"] = memcpy_to_new_file(work, calls, folder / "copy.bin")
    stats = ours.buffer.stats()
    assert stats.tokens == work.tokens and stats.pages_free == 0
    size = path.stat().st_size
    ours.restart(work)
    speeds["append_many"] = fill_by_steps(ours, work, calls)
    speeds["limit append_many"] = memcpy_steps(work, calls)
    assert path.stat().st_size == size
    pack_all(ours, work)  # The first one faults the pages of ``out`` in again.
    speeds["pack"] = pack_all(ours, work)
    speeds["limit pack"] = memcpy_out(work)
    check(ours, work)
    ours.close()
    path.unlink()
    return speeds | {"bytes": size / work.tokens}


@pytest.mark.parametrize("rows", ["short", "long"])
def test_append_many_pack_and_size(rows, request, folder, ratios, benchmark):
    work: Work = request.getfixturevalue("work" if rows == "short" else "long")
    rounds: list[dict[str, float]] = []
    benchmark.pedantic(lambda: rounds.append(measure(work, folder)), rounds=ROUNDS)
    best = {name: max(one[name] for one in rounds) for name in rounds[0]}
    for name, peer in LIMITS.items():
        ours, limit = best[name], best[f"limit {name}"]
        ratios.record(
            f"buffer {name}, {rows} rows",
            peer,
            ours / limit,
            minimum=0.3,
            detail=f"{ours:.0f} against {limit:.0f} tokens/CPU-µs",
        )
    ratios.record(
        f"buffer bytes, {rows} rows",
        "10.5 bytes a token",
        10.5 / best["bytes"],
        minimum=1.0,
        detail=f"{best['bytes']:.2f} bytes a token on disk at {PAYLOAD} of payload",
    )


def compare(peer: type, name: str, work: Work, folder: Path, ratios, minimum=None) -> None:
    """Run ours and the peer in turn on the same work: one call for each segment, packs of 64."""
    speeds: dict[str, list[float]] = {"ours in": [], "in": [], "ours out": [], "out": []}
    for index in range(ROUNDS):
        place = folder / str(index)
        place.mkdir()
        for prefix, kind in (("ours ", Ours), ("", peer)):
            try:
                one = kind(work, place)
            except ImportError as error:
                missing(ratios, "buffer append", name, error)
                missing(ratios, "buffer pack", name, error)
                return
            speeds[f"{prefix}in"].append(fill(one, work))
            pack_all(one, work)
            speeds[f"{prefix}out"].append(pack_all(one, work))
            check(one, work)
            one.close()
        shutil.rmtree(place)
    best = {kind: max(values) for kind, values in speeds.items()}
    for what, kind, needed in (("append", "in", minimum), ("pack", "out", None)):
        ours, theirs = best[f"ours {kind}"], best[kind]
        detail = f"{ours:.3g} against {theirs:.3g} tokens/CPU-µs"
        ratios.record(f"buffer {what}", name, ours / theirs, minimum=needed, detail=detail)


def test_against_memcpy_a_segment(work, folder, ratios):
    ours = Ours(work, folder)
    speed, limit = fill(ours, work), memcpy_in(work)
    ours.close()
    detail = f"{speed:.0f} against {limit:.0f} tokens/CPU-µs"
    ratios.record("buffer append", "numpy copy of a segment", speed / limit, detail=detail)


def test_against_numpy_memmap(work, folder, ratios):
    compare(Memmap, "numpy memmap", work, folder, ratios, minimum=3.0)


def test_against_python_lists(work, folder, ratios):
    compare(Lists, "python lists", work, folder, ratios)


def test_against_lmdb(work, folder, ratios):
    compare(Lmdb, "lmdb without sync", work, folder, ratios)


def test_against_torchrl(less, folder, ratios):
    compare(TorchRl, "torchrl memmap", less, folder, ratios, minimum=50.0)


@pytest.mark.parametrize("rows", ["short", "long"])
def test_open_and_recover_is_quick(rows, request, folder, ratios):
    work: Work = request.getfixturevalue("work" if rows == "short" else "long")
    ours = Ours(work, folder)
    fill_by_steps(ours, work, steps_of(work))
    ours.close()
    target, file = np.ones(PAYLOAD * work.tokens, np.uint8), (folder / "ours.bin").read_bytes()
    stored = np.frombuffer(file, np.uint8)[: len(target)]
    spent, copied = [], []
    for _ in range(ROUNDS):
        started = time.process_time()
        buffer = RolloutBuffer.open(folder / "ours.bin")
        spent.append(time.process_time() - started)
        assert buffer.recovery["tokens"] == work.tokens
        buffer.close()
        copied.append(cpu_us(lambda: np.copyto(target, stored)) / 1e6)
    seconds, limit = min(spent) * 20e6 / work.tokens, min(copied) * 20e6 / work.tokens
    detail = f"{seconds:.3f} CPU s for 20 M tokens, every checksum compared"
    name = f"buffer open and recover, {rows} rows"
    ratios.record(name, "0.5 s", 0.5 / seconds, minimum=1.0, detail=detail)
    detail = f"{seconds:.3f} against {limit:.3f} CPU s for 20 M tokens"
    ratios.record(name, "memcpy of the payload", limit / seconds, detail=detail)
