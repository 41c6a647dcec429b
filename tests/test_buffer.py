"""The buffer compared with a model in plain Python: any order of calls, any sizes, reopened."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from buffer_model import COLUMNS, BufferModel
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from kimi_core import _C
from kimi_core.buffer import RolloutBuffer
from kimi_core.types import PROMPT_VERSION, Batch

REASONS = st.sampled_from([None, None, None, "stop", "length", "repeat"])


def columns(n: int, seed: int = 0, sampled: bool = True) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 50_000, n).astype(np.int32),
        (-rng.random(n) * sampled).astype(np.float32),
        np.full(n, sampled, np.uint8),
    )


def rows_of(found) -> list[tuple]:
    for name, dtype in COLUMNS.items():
        assert getattr(found, name).dtype == dtype
    return list(zip(*(getattr(found, name).tolist() for name in COLUMNS), strict=True))


class Buffers(RuleBasedStateMachine):
    ids = Bundle("ids")

    @initialize(pages=st.integers(1, 60), most=st.integers(1, 6), page=st.sampled_from([8, 16]))
    def create(self, pages, most, page):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "buffer.bin"
        sizes = {"page_tokens": page, "max_trajectories": most}
        self.buffer = RolloutBuffer.create(self.path, capacity_tokens=pages * page, **sizes)
        self.model = BufferModel(pages=pages, **sizes)
        # Opened when the file has no page: its mapping is older than all that it reads.
        self.early = RolloutBuffer.open(self.path, readonly=True)

    def teardown(self):
        if hasattr(self, "buffer"):
            self.early.close()
            self.buffer.close()
            self.folder.cleanup()

    @rule(target=ids, prompt=st.integers(0, 1 << 40), group=st.integers(0, 1 << 40))
    def begin(self, prompt, group):
        if len(self.model.slots) >= self.model.max_trajectories:
            with pytest.raises(ValueError, match=f"all {self.model.max_trajectories} are in use"):
                self.buffer.begin(prompt, group)
            return multiple()
        trajectory_id = self.buffer.begin(prompt, group)
        assert trajectory_id == self.model.begin(prompt, group)
        return trajectory_id

    @rule(
        key=ids,
        n=st.integers(0, 40),
        seed=st.integers(0, 99),
        sampled=st.booleans(),
        version=st.integers(PROMPT_VERSION, 9),
        reason=REASONS,
        lease=st.sampled_from([None, None, 0, 1]),
    )
    def append(self, key, n, seed, sampled, version, reason, lease):
        given = columns(n, seed, sampled)
        named = {"policy_version": version, "end_reason": reason, "lease": lease}
        if refusal := self.model.refusal(key, n, lease):
            with pytest.raises((KeyError, ValueError), match=refusal):
                self.buffer.append(key, *given, **named)
            return
        free = self.model.pages_free()
        length = self.model.append(key, *given, version, reason)
        self.model.grow(free)
        assert self.buffer.append(key, *given, **named) == length
        for column in given:
            column[:] = 1  # The buffer has a copy.

    @rule(
        parts=st.lists(st.tuples(ids, st.integers(0, 20), REASONS), max_size=5),
        seed=st.integers(0, 99),
    )
    def append_many(self, parts, seed):
        given = columns(sum(n for _, n, _ in parts), seed)
        keys = np.array([key for key, _, _ in parts], np.int64)
        ends = np.cumsum([0, *(n for _, n, _ in parts)], dtype=np.int32)
        versions = np.arange(len(parts), dtype=np.int32)
        reasons = [reason for _, _, reason in parts]
        backup = {key: (list(s.rows), list(s.segments), s.end_reason) for key, s in self.slots()}
        lengths, free = [], self.model.pages_free()
        for i, (key, n, reason) in enumerate(parts):
            if refusal := self.model.refusal(key, n, None):
                for old, slot in self.slots():  # All or nothing.
                    slot.rows, slot.segments, slot.end_reason = backup[old]
                refusal = r"Cannot append \d+ tokens" if "tokens" in refusal else refusal
                # Free pages are checked last, so a fault of a later segment may be named.
                with pytest.raises((KeyError, ValueError), match=f"{refusal}|No traj|it ended by"):
                    self.buffer.append_many(keys, *given, ends, versions, end_reasons=reasons)
                return
            part = (column[ends[i] : ends[i + 1]] for column in given)
            lengths.append(self.model.append(key, *part, i, reason))
        self.model.grow(free)
        done = self.buffer.append_many(keys, *given, ends, versions, end_reasons=reasons)
        assert done.tolist() == lengths

    @rule(key=ids, reason=st.sampled_from(["stop", "length", "repeat", "bored", ""]))
    def finish(self, key, reason):
        if reason in ("bored", ""):
            with pytest.raises(ValueError, match=f"Cannot finish by '{reason}'"):
                self.buffer.finish(key, reason)
        elif key not in self.model.slots:
            with pytest.raises(KeyError):
                self.buffer.finish(key, reason)
        elif self.model.slots[key].end_reason:
            with pytest.raises(ValueError, match="has ended already"):
                self.buffer.finish(key, reason)
        else:
            self.buffer.finish(key, reason)
            self.model.slots[key].end_reason = reason

    @rule(key=ids)
    def resume(self, key):
        slot = self.model.slots.get(key)
        if slot is None or slot.end_reason:
            with pytest.raises((KeyError, ValueError), match=r"No trajectory|Cannot resume"):
                self.buffer.resume(key)
        else:
            slot.lease += 1
            assert self.buffer.resume(key) == slot.lease

    @rule(keys=st.lists(ids, max_size=4))
    def evict(self, keys):
        if all(key in self.model.slots for key in keys):
            self.buffer.evict(keys)
            self.model.evict(keys)
        else:
            with pytest.raises(KeyError):
                self.buffer.evict(keys)

    @rule(keys=st.lists(ids, max_size=4), spare=st.none() | st.integers(-1, 3))
    def pack(self, keys, spare):
        if not all(key in self.model.slots for key in keys):
            with pytest.raises(KeyError):
                self.buffer.pack(keys)
            return
        expected = [self.model.slots[key].rows for key in keys]
        total = sum(map(len, expected))
        out = None
        if spare is not None and total + spare >= 0:
            arrays = (np.empty(total + spare, dtype) for dtype in COLUMNS.values())
            out = Batch(*arrays, np.empty(len(keys) + 1, np.int32))
            if spare < 0:
                with pytest.raises(ValueError, match=f"Cannot pack {total} tokens"):
                    self.buffer.pack(keys, out=out)
                return
        batch = self.buffer.pack(keys, out=out)
        assert batch.lengths.tolist() == list(map(len, expected))
        assert batch.cu_seqlens.dtype == np.int32
        assert rows_of(batch) == [row for rows in expected for row in rows]
        assert out is None or np.shares_memory(batch.token_ids, out.token_ids) or not total
        plain = self.buffer.pack(keys, device="cpu")
        gathered = self.buffer._gather_on(torch.device("cpu"), np.array(keys, np.int64))
        for name in (*COLUMNS, "cu_seqlens"):
            expected_column = torch.from_numpy(getattr(batch, name))
            for found in (plain, gathered):
                assert getattr(found, name).dtype == expected_column.dtype
                assert torch.equal(getattr(found, name), expected_column)

    @rule(readonly=st.booleans(), snapshot=st.booleans())
    def reopen(self, readonly, snapshot):
        if snapshot:
            self.path = self.path.with_suffix(".copy" if self.path.suffix == ".bin" else ".bin")
            self.buffer.snapshot(self.path)
            self.early.close()
            self.early = RolloutBuffer.open(self.path, readonly=True)
        if readonly:
            with RolloutBuffer.open(self.path, readonly=True) as reader:
                assert reader.trajectories() == self.buffer.trajectories()
                with pytest.raises(ValueError, match="is open for reading only"):
                    reader.begin(0, 0)
        self.buffer.close()
        with pytest.raises(ValueError, match="is closed"):
            self.buffer.unfinished()
        self.buffer = RolloutBuffer.open(self.path)
        assert self.buffer.recovery["cuts"] == []
        assert self.buffer.recovery["trajectories"] == len(self.model.slots)
        if snapshot:  # The copy ends behind the last page in use; the model has no page numbers.
            shorter = self.buffer.stats().pages_allocated
            in_use = self.model.pages - self.model.pages_free()
            assert in_use <= shorter <= self.model.pages_allocated
            self.model.pages_allocated = shorter

    @invariant()
    def reads_back(self):
        lengths = {info.trajectory_id: info.length for info in self.buffer.trajectories()}
        for key, slot in self.slots():
            found, expected = self.buffer.read(key), self.model.read(key)
            assert rows_of(found) == slot.rows
            assert rows_of(self.early.read(key)) == slot.rows
            for name in ("trajectory_id", "prompt_id", "group_id", "end_reason"):
                assert getattr(found, name) == getattr(expected, name)
            assert self.buffer.segments(key) == slot.segments
            assert lengths[key] == len(slot.rows)
            found.token_ids[:] = -5  # The caller has a copy.

    @invariant()
    def counts(self):
        slots = self.model.slots
        open_ids = [key for key, slot in slots.items() if slot.end_reason is None]
        assert self.buffer.unfinished() == open_ids
        assert self.buffer.finished() == [key for key in slots if key not in open_ids]
        stats = self.buffer.stats()
        assert (stats.trajectories, stats.unfinished) == (len(slots), len(open_ids))
        assert stats.tokens == sum(len(slot.rows) for slot in slots.values())
        assert (stats.pages, stats.pages_free) == (self.model.pages, self.model.pages_free())
        assert stats.pages_allocated == self.model.pages_allocated
        most = RolloutBuffer.file_bytes(
            stats.capacity_tokens, stats.max_trajectories, stats.page_tokens
        )
        missing = (stats.pages - stats.pages_allocated) * 9 * stats.page_tokens
        assert self.path.stat().st_size == most - missing
        versions = [row[3] for s in slots.values() for row in s.rows if row[3] >= 0]
        assert stats.tokens_by_version == {v: versions.count(v) for v in versions}

    def slots(self):
        return self.model.slots.items()


TestBuffers = Buffers.TestCase
TestBuffers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def make(tmp_path):
    """Makes a small buffer; named settings override its sizes."""

    def create(name: str = "buffer.bin", **sizes) -> RolloutBuffer:
        sizes = {"capacity_tokens": 64, "max_trajectories": 2, "page_tokens": 8} | sizes
        return RolloutBuffer.create(tmp_path / name, **sizes)

    return create


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"capacity_tokens": 0}, "both sizes must be at least 1"),
        ({"capacity_tokens": -1}, "both sizes must be at least 1"),
        ({"max_trajectories": 0}, "both sizes must be at least 1"),
        ({"page_tokens": 12}, "page_tokens = 12: it must be a multiple of 8"),
        ({"page_tokens": 0}, "page_tokens = 0"),
        ({"capacity_tokens": 1 << 62}, "too large"),
    ],
)
def test_a_size_out_of_range_is_refused(make, tmp_path, sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(**sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logprob_that_is_not_finite_is_refused_and_nothing_kept(make, bad):
    buffer = make()
    key = buffer.begin(0, 0)
    token_ids, logprobs, mask = columns(3)
    logprobs[1] = bad
    with pytest.raises(ValueError, match="log-prob 1 of the segment is"):
        buffer.append(key, token_ids, logprobs, mask, policy_version=0)
    assert buffer.stats().tokens == 0
    assert len(buffer.read(key).token_ids) == 0


@pytest.mark.parametrize("short", [0, 1, 2])
def test_columns_of_different_shapes_are_refused(make, short):
    buffer = make()
    key = buffer.begin(0, 0)
    given = list(columns(3))
    given[short] = given[short][:2]
    with pytest.raises(ValueError, match="different shapes"):
        buffer.append(key, *given, policy_version=0)
    assert buffer.stats().tokens == 0


def test_what_would_lose_precision_is_refused(make):
    buffer = make()
    key = buffer.begin(0, 0)
    token_ids, logprobs, mask = columns(3)
    with pytest.raises(TypeError):
        buffer.append(key, token_ids.astype(np.int64), logprobs, mask, policy_version=0)
    with pytest.raises(TypeError):
        buffer.append(key, token_ids, logprobs.astype(np.float64), mask, policy_version=0)


def test_torch_tensors_go_in_and_are_packed_into(make):
    buffer = make()
    key = buffer.begin(0, 0)
    given = [torch.from_numpy(column) for column in columns(20)]
    buffer.append(key, *given, policy_version=0)
    tensors = [torch.zeros(30, dtype=d) for d in (torch.int32, torch.float32, torch.uint8)]
    out = Batch(*tensors, torch.zeros(30, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    batch = buffer.pack([key], out=out)
    assert torch.equal(tensors[1][:20], given[1])
    assert torch.from_numpy(batch.logprobs).data_ptr() == tensors[1].data_ptr()
    wrong = Batch(tensors[1], *tensors[1:], tensors[0], tensors[0])
    with pytest.raises(TypeError):
        buffer.pack([key], out=wrong)


def test_out_and_device_together_are_refused(make):
    buffer = make()
    empty = buffer.pack([])
    with pytest.raises(ValueError, match="device='cpu': give only one of them"):
        buffer.pack([], out=empty, device="cpu")


def test_a_build_without_device_code_says_how_to_get_it():
    if _C.has_device_code():
        pytest.skip("this build has device code")
    nothing = dict.fromkeys(
        ("pages", "first_pages", "cu_seqlens", "token_ids", "logprobs", "mask", "stream"), 0
    )
    with pytest.raises(RuntimeError, match="KIMI_CUDA=ON"):
        _C.gather_pages(page_tokens=8, sequences=1, tokens=1, **nothing)


@pytest.mark.gpu
@pytest.mark.parametrize("page_tokens", [8, 256])
def test_a_batch_on_a_gpu_is_the_one_on_the_cpu(make, page_tokens):
    """Lengths: none, within a page, a whole page, one more, several pages; ids in another order."""
    buffer = make(capacity_tokens=100_000, max_trajectories=8, page_tokens=page_tokens)
    for n in (0, 3, page_tokens, page_tokens + 1, 80 * page_tokens):
        key = buffer.begin(0, 0)
        buffer.append(key, *columns(n, n, sampled=False), policy_version=PROMPT_VERSION)
        buffer.append(key, *columns(2 * n, n), policy_version=n)
    keys = [4, 0, 2, 1, 3, 4]
    expected, found = buffer.pack(keys), buffer.pack(keys, device="cuda")
    for name in (*COLUMNS, "cu_seqlens"):
        column = getattr(found, name)
        assert column.is_cuda
        assert torch.equal(column.cpu(), torch.from_numpy(getattr(expected, name)))
    assert len(buffer.pack([], device="cuda").token_ids) == 0


def test_no_file_to_open_and_one_too_many(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        RolloutBuffer.open(tmp_path / "nothing.bin")
    buffer = make()
    with pytest.raises(FileExistsError):
        make()
    with pytest.raises(ValueError, match="open for writing already"):
        RolloutBuffer.open(tmp_path / "buffer.bin")
    RolloutBuffer.open(tmp_path / "buffer.bin", readonly=True).close()
    with pytest.raises(FileNotFoundError):
        buffer.snapshot(tmp_path / "nowhere" / "copy")
