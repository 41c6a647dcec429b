"""The work of ``bench_buffer``, and the stores that do it: our buffer and its peers.

A store takes each segment by a call of ``append`` and returns packs of whole trajectories.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core.buffer import RolloutBuffer
from kimi_core.types import Batch

MEAN, LONGEST, SPREAD = 2_000, 32_768, 1.0
SEGMENT, OPEN, PACKED = 256, 64, 64
CONTEXT = 131_072
NAMES = ("token_ids", "logprobs", "mask", "policy_versions")
PAYLOAD = 9
"""Bytes of a token. The policy version is not counted, because a segment has only one."""

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


class Work:
    """Lengths of the trajectories, the order of their segments, and columns to take tokens from.

    Lengths are lognormal, or all are ``length``. ``segments`` are (trajectory, start, end). The
    values of a token follow from its trajectory and position, so that the contents of a peer can be
    checked. Each of ``packs`` has ``packed`` trajectories.
    """

    def __init__(
        self, trajectories: int, *, length: int | None = None, packed: int = PACKED
    ) -> None:
        rng = np.random.default_rng(0)
        drawn = rng.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, trajectories)
        self.lengths = np.clip(drawn, 1, LONGEST).astype(np.int64)
        if length is not None:
            self.lengths[:] = length
        self.longest = length or LONGEST
        self.tokens = int(self.lengths.sum())
        self.source = (
            rng.integers(0, 150_000, 2 * self.longest).astype(np.int32),
            -rng.random(2 * self.longest, np.float32),
            (rng.random(2 * self.longest) < 0.9).astype(np.uint8),
        )
        self.segments = list(self._interleave(rng))
        self.packs = [rng.choice(trajectories, packed, replace=False) for _ in range(40)]

    def _interleave(self, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
        """Yield steps of 64 segments, one for each open trajectory."""
        done = np.zeros(len(self.lengths), np.int64)
        waiting = list(rng.permutation(len(self.lengths)))
        opened = [waiting.pop() for _ in range(min(OPEN, len(waiting)))]
        while opened:
            for key in opened:
                start = int(done[key])
                done[key] = min(start + SEGMENT, self.lengths[key])
                yield int(key), start, int(done[key])
            opened = [key for key in opened if done[key] < self.lengths[key]]
            opened += [waiting.pop() for _ in range(min(OPEN - len(opened), len(waiting)))]

    def columns(self, key: int, start: int, end: int) -> Columns:
        """Views of the source, so that providing tokens costs nothing."""
        at = key % self.longest
        ids, logprobs, mask = self.source
        return (
            ids[at + start : at + end],
            logprobs[at + start : at + end],
            mask[at + start : at + end],
        )


class Ours:
    """Our buffer."""

    def __init__(self, work: Work, folder: Path) -> None:
        counts = [-(-length // SEGMENT) for length in work.lengths]
        taken = sum(map(RolloutBuffer.tokens_taken, work.lengths.tolist(), counts))
        self.buffer = RolloutBuffer.create(
            folder / "ours.bin", capacity_tokens=taken, max_trajectories=len(work.lengths)
        )
        self.first = 0
        self.begin(work)
        self.out = Batch(*_arrays(work))

    def begin(self, work: Work) -> None:
        for key in range(len(work.lengths)):
            self.buffer.begin(key, key)

    def restart(self, work: Work) -> None:
        """Evict everything, and begin the same trajectories; their ids go on from there."""
        self.first += len(work.lengths)
        self.buffer.evict(range(self.first - len(work.lengths), self.first))
        self.begin(work)

    def append(self, key: int, columns: Columns, version: int) -> None:
        ids, logprobs, mask = columns
        self.buffer.append(key, ids, logprobs, mask, policy_version=version)

    def pack(self, keys: np.ndarray) -> Batch:
        return self.buffer.pack(keys + self.first, out=self.out)

    def close(self) -> None:
        self.buffer.close()


class Memmap:
    """One memory-mapped numpy array for each column, touched before use."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.starts = np.cumsum([0, *work.lengths])
        types = (np.int32, np.float32, np.uint8, np.int32)
        self.columns = [
            np.memmap(folder / name, dtype, "w+", shape=(work.tokens,))
            for name, dtype in zip(NAMES, types, strict=True)
        ]
        for column in self.columns:
            column[:] = 0
        self.lengths = np.memmap(folder / "lengths", np.int64, "w+", shape=work.lengths.shape)

    def append(self, key: int, columns: Columns, version: int) -> None:
        start = self.starts[key] + self.lengths[key]
        end = start + len(columns[0])
        for mine, given in zip(self.columns, columns, strict=False):
            mine[start:end] = given
        self.columns[3][start:end] = version
        self.lengths[key] += len(columns[0])

    def pack(self, keys: np.ndarray) -> Batch:
        spans = [slice(self.starts[k], self.starts[k] + self.lengths[k]) for k in keys]
        return _batch([[column[span] for span in spans] for column in self.columns])

    def close(self) -> None:
        pass


class Lists:
    """Python lists of numpy arrays: as fast as possible, but lost with the process."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in work.lengths]

    def append(self, key: int, columns: Columns, version: int) -> None:
        copies = [column.copy() for column in columns]
        self.parts[key].append((*copies, np.full(len(copies[0]), version, np.int32)))

    def pack(self, keys: np.ndarray) -> Batch:
        whole = [[np.concatenate(c) for c in zip(*self.parts[k], strict=True)] for k in keys]
        return _batch([list(column) for column in zip(*whole, strict=True)])

    def close(self) -> None:
        pass


class Lmdb:
    """LMDB without sync: one entry for each segment, and 64 segments in a transaction."""

    def __init__(self, work: Work, folder: Path) -> None:
        import lmdb

        self.database = lmdb.open(
            str(folder / "lmdb"), map_size=1 << 34, sync=False, metasync=False, writemap=True
        )
        self.counts = [0] * len(work.lengths)
        self.transaction: Any = None
        self.open = 0

    def append(self, key: int, columns: Columns, version: int) -> None:
        if self.open == 0:
            self.transaction = self.database.begin(write=True)
        name = key.to_bytes(4, "big") + self.counts[key].to_bytes(4, "big")
        values = version.to_bytes(4, "little") + b"".join(map(np.ndarray.tobytes, columns))
        self.transaction.put(name, values)
        self.counts[key] += 1
        self.open = (self.open + 1) % OPEN
        if self.open == 0:
            self.transaction.commit()

    def pack(self, keys: np.ndarray) -> Batch:
        if self.open:
            self.transaction.commit()
            self.open = 0
        columns: list[list[list[np.ndarray]]] = [[], [], [], []]
        with self.database.begin(buffers=True) as reading:
            for key in keys:
                parts = [self._parts(reading, int(key), i) for i in range(self.counts[key])]
                for column, pieces in zip(columns, zip(*parts, strict=True), strict=True):
                    column.append(np.concatenate(pieces))  # type: ignore[arg-type]
            return _batch(columns)  # type: ignore[arg-type]

    def _parts(self, reading: Any, key: int, index: int) -> tuple[np.ndarray, ...]:
        value = reading.get(key.to_bytes(4, "big") + index.to_bytes(4, "big"))
        n = (len(value) - 4) // PAYLOAD
        version = int.from_bytes(value[:4], "little")
        return (
            np.frombuffer(value, np.int32, n, 4),
            np.frombuffer(value, np.float32, n, 4 + 4 * n),
            np.frombuffer(value, np.uint8, n, 4 + 8 * n),
            np.full(n, version, np.int32),
        )

    def close(self) -> None:
        self.database.close()


class TorchRl:
    """TorchRL's ReplayBuffer over LazyMemmapStorage: one entry, padded to 256 tokens, a segment."""

    def __init__(self, work: Work, folder: Path) -> None:
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyMemmapStorage, ReplayBuffer

        self.torch, self.dict = torch, TensorDict
        storage = LazyMemmapStorage(len(work.segments), scratch_dir=str(folder / "torchrl"))
        self.replay = ReplayBuffer(storage=storage)
        self.entries: list[list[int]] = [[] for _ in work.lengths]

    def append(self, key: int, columns: Columns, version: int) -> None:
        n = len(columns[0])
        padded = [np.zeros(SEGMENT, column.dtype) for column in columns]
        for target, column in zip(padded, columns, strict=True):
            target[:n] = column
        fields: dict = dict(zip(NAMES, map(self.torch.from_numpy, padded), strict=False))
        entry = self.dict(
            {**fields, "n": self.torch.tensor(n), "version": self.torch.tensor(version)}
        )
        self.entries[key].append(int(self.replay.add(entry)))

    def pack(self, keys: np.ndarray) -> Batch:
        whole: list[list[np.ndarray]] = [[], [], [], []]
        for key in keys:
            found = self.replay[self.torch.tensor(self.entries[key])]
            kept = self.torch.arange(SEGMENT) < found["n"][:, None]
            for column, name in zip(whole[:3], NAMES, strict=False):
                column.append(found[name][kept].numpy())
            versions = found["version"][:, None].expand(-1, SEGMENT)[kept]
            whole[3].append(versions.to(self.torch.int32).numpy())
        return _batch(whole)

    def close(self) -> None:
        pass


def _arrays(work: Work) -> tuple[np.ndarray, ...]:
    """Arrays that hold any pack, touched; a trainer also packs into the same arrays every time."""
    packed = len(work.packs[0])
    most = int(np.sort(work.lengths)[-packed:].sum())
    types = (np.int32, np.float32, np.uint8, np.int32)
    return (*(np.ones(most, dtype) for dtype in types), np.ones(packed + 1, np.int32))


def _batch(columns: list[list[np.ndarray]]) -> Batch:
    cu_seqlens = np.cumsum([0, *map(len, columns[0])], dtype=np.int32)
    return Batch(*(np.concatenate(column) for column in columns), cu_seqlens)  # type: ignore[call-arg]
