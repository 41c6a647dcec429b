"""The buffer against a model of it in plain dicts and lists: any order of calls, any sizes."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from kimi_core.buffer import RolloutBuffer
from kimi_core.types import PROMPT_VERSION

NAMES = ("token_ids", "logprobs", "mask", "policy_versions")
DTYPES = {"token_ids": "int32", "logprobs": "float32", "mask": "uint8", "policy_versions": "int32"}


def columns(n: int, seed: int = 0, sampled: bool = True) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 50_000, n).astype(np.int32),
        (-rng.random(n) * sampled).astype(np.float32),
        np.full(n, sampled, np.uint8),
    )


class Buffers(RuleBasedStateMachine):
    """``slots`` is the model: id to its prompt, group, rows of four values, and why it ended."""

    ids = Bundle("ids")

    @initialize(capacity=st.integers(1, 60), most=st.integers(1, 6))
    def create(self, capacity, most):
        self.buffer = RolloutBuffer.create(capacity_tokens=capacity, max_trajectories=most)
        self.capacity, self.most = capacity, most
        self.slots: dict[int, dict] = {}
        self.begun = 0

    @rule(target=ids, prompt=st.integers(0, 1 << 40), group=st.integers(0, 1 << 40))
    def begin(self, prompt, group):
        if len(self.slots) >= self.most:
            with pytest.raises(ValueError, match=f"all {self.most} are in use"):
                self.buffer.begin(prompt, group)
            return multiple()
        trajectory_id = self.buffer.begin(prompt, group)
        assert trajectory_id == self.begun
        self.begun += 1
        self.slots[trajectory_id] = {"prompt": prompt, "group": group, "rows": [], "reason": None}
        return trajectory_id

    @rule(
        key=ids,
        n=st.integers(0, 20),
        seed=st.integers(0, 99),
        sampled=st.booleans(),
        version=st.integers(PROMPT_VERSION, 9),
    )
    def append(self, key, n, seed, sampled, version):
        given = columns(n, seed, sampled)
        if key not in self.slots:
            with pytest.raises(KeyError, match=f"No trajectory {key}"):
                self.buffer.append(key, *given, policy_version=version)
        elif self.slots[key]["reason"]:
            with pytest.raises(ValueError, match="it ended by"):
                self.buffer.append(key, *given, policy_version=version)
        elif self.tokens() + n > self.capacity:
            with pytest.raises(ValueError, match=f"Cannot append {n} tokens"):
                self.buffer.append(key, *given, policy_version=version)
        else:
            rows = self.slots[key]["rows"]
            rows.extend((*row, version) for row in zip(*(c.tolist() for c in given), strict=True))
            assert self.buffer.append(key, *given, policy_version=version) == len(rows)
            for column in given:
                column[:] = 1  # The buffer has a copy.

    @rule(key=ids, reason=st.sampled_from(["stop", "length", "repeat", "bored"]))
    def finish(self, key, reason):
        if key not in self.slots:
            with pytest.raises(KeyError):
                self.buffer.finish(key, reason)
        elif reason == "bored" or self.slots[key]["reason"]:
            with pytest.raises(ValueError, match=r"ended already|Cannot finish by 'bored'"):
                self.buffer.finish(key, reason)
        else:
            self.buffer.finish(key, reason)
            self.slots[key]["reason"] = reason

    @rule(keys=st.lists(ids, max_size=4, unique=True))
    def evict(self, keys):
        if all(key in self.slots for key in keys):
            self.buffer.evict(keys)
            for key in keys:
                del self.slots[key]
        else:
            with pytest.raises(KeyError):
                self.buffer.evict(keys)

    @rule(keys=st.lists(ids, max_size=4))
    def pack(self, keys):
        if not all(key in self.slots for key in keys):
            with pytest.raises(KeyError):
                self.buffer.pack(keys)
            return
        batch = self.buffer.pack(keys)
        assert batch.lengths.tolist() == [len(self.slots[key]["rows"]) for key in keys]
        assert batch.cu_seqlens.dtype == np.int32
        assert self.rows_of(batch) == [row for key in keys for row in self.slots[key]["rows"]]

    @rule()
    def reopen(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "buffer.npz"
            self.buffer.snapshot(path)
            self.buffer = RolloutBuffer.open(path)

    @invariant()
    def reads_back(self):
        for key, slot in self.slots.items():
            found = self.buffer.read(key)
            assert self.rows_of(found) == slot["rows"]
            assert (found.trajectory_id, found.prompt_id, found.group_id, found.end_reason) == (
                key,
                slot["prompt"],
                slot["group"],
                slot["reason"],
            )
            found.token_ids[:] = -5  # The caller has a copy.

    @invariant()
    def counts(self):
        open_ids = [key for key, slot in self.slots.items() if slot["reason"] is None]
        assert self.buffer.unfinished() == open_ids
        assert self.buffer.finished() == [key for key in self.slots if key not in open_ids]
        stats = self.buffer.stats()
        assert (stats.trajectories, stats.unfinished) == (len(self.slots), len(open_ids))
        assert (stats.tokens, stats.capacity_tokens) == (self.tokens(), self.capacity)
        versions = [row[3] for slot in self.slots.values() for row in slot["rows"] if row[2]]
        assert stats.tokens_by_version == {v: versions.count(v) for v in versions}

    def tokens(self) -> int:
        return sum(len(slot["rows"]) for slot in self.slots.values())

    def rows_of(self, found) -> list[tuple]:
        for name in NAMES:
            assert getattr(found, name).dtype == DTYPES[name]
        return list(zip(*(getattr(found, name).tolist() for name in NAMES), strict=True))


TestBuffers = Buffers.TestCase
TestBuffers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("tokens", "trajectories"), [(0, 1), (1, 0), (-1, 5)])
def test_an_empty_size_is_refused(tokens, trajectories):
    with pytest.raises(ValueError, match="both must be at least 1"):
        RolloutBuffer.create(capacity_tokens=tokens, max_trajectories=trajectories)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logprob_that_is_not_finite_is_refused_and_nothing_kept(bad):
    buffer = RolloutBuffer.create(capacity_tokens=9, max_trajectories=1)
    key = buffer.begin(0, 0)
    token_ids, logprobs, mask = columns(3)
    logprobs[1] = bad
    with pytest.raises(ValueError, match="log-prob 1 of the segment is"):
        buffer.append(key, token_ids, logprobs, mask, policy_version=0)
    assert buffer.stats().tokens == 0
    assert len(buffer.read(key).token_ids) == 0


@pytest.mark.parametrize("short", [0, 1, 2])
def test_columns_of_different_shapes_are_refused(short):
    buffer = RolloutBuffer.create(capacity_tokens=9, max_trajectories=1)
    key = buffer.begin(0, 0)
    given = list(columns(3))
    given[short] = given[short][:2]
    with pytest.raises(ValueError, match="different shapes"):
        buffer.append(key, *given, policy_version=0)
    assert buffer.stats().tokens == 0


def test_no_file_to_open(tmp_path):
    with pytest.raises(FileNotFoundError):
        RolloutBuffer.open(tmp_path / "buffer.npz")


def test_ids_go_on_where_they_were_after_a_restart(tmp_path):
    buffer = RolloutBuffer.create(capacity_tokens=9, max_trajectories=2)
    buffer.evict([buffer.begin(0, 0), buffer.begin(0, 0)])
    buffer.snapshot(tmp_path / "buffer.npz")
    assert RolloutBuffer.open(tmp_path / "buffer.npz").begin(0, 0) == 2
