"""The rollout phase compared with what its buffer holds, read back token by token."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import RolloutConfig
from kimi_core.rollout.phase import begin_group, roll_out
from kimi_core.types import Prompt, Sampling, Segment

CONFIG = RolloutConfig(max_response_tokens=20, token_budget=8)
SAMPLING = Sampling(0, seed=0, stop_token_ids=frozenset())


class RandomEngine:
    """Grows each request by its budget in segments of random lengths, and may end it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.policy_version, self.decode_steps = rng, 0, 0

    def generate(self, requests, sampling):
        for request in requests:
            left, reason = request.budget, None
            while left and reason is None:
                n = int(self.rng.integers(1, left + 1))
                left -= n
                self.decode_steps += n
                reason = self.rng.choice([None, None, "stop", "repeat"])
                if reason is None and request.budget - left == request.remaining:
                    reason = "length"
                ids = self.rng.integers(0, 99, n).astype(np.int32)
                logprobs = -self.rng.random(n, np.float32)
                yield [Segment(request.trajectory_id, ids, logprobs, self.policy_version, reason)]
                if self.rng.random() < 0.1:
                    break


class CountingBuffer(RolloutBuffer):
    """Counts how often the tokens of each trajectory are read."""

    reads: Counter

    def read(self, trajectory_id):
        self.reads[trajectory_id] += 1
        return super().read(trajectory_id)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1 << 30), phases=st.integers(1, 6))
def test_a_phase_reads_each_trajectory_once_and_again_when_it_ends(seed, phases):
    engine = RandomEngine(np.random.default_rng(seed))
    with (
        tempfile.TemporaryDirectory() as folder,
        CountingBuffer.create(
            Path(folder) / "buffer.bin", capacity_tokens=10_000, max_trajectories=40, page_tokens=8
        ) as buffer,
    ):
        for phase in range(phases):
            begin_group(
                buffer,
                Prompt(phase, "", ""),
                np.arange(5, dtype=np.int32),
                group_id=phase,
                samples=4,
            )
            there = [info.trajectory_id for info in buffer.trajectories()]
            waiting = buffer.unfinished()
            steps, buffer.reads = engine.decode_steps, Counter()
            found = roll_out(engine, buffer, CONFIG, SAMPLING)
            assert buffer.reads == Counter(there) + Counter(set(waiting) - set(buffer.unfinished()))
            check(found, [buffer.read(key) for key in there], phase, engine.decode_steps - steps)
            buffer.evict([one.trajectory_id for one in found.finished[::2]])
            engine.policy_version += 1


def check(found, there, version, steps) -> None:
    ended = [one for one in there if one.end_reason is not None]
    for one, expected in zip(found.finished, ended, strict=True):
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(one, name), value)
    lengths: dict[int, list[int]] = {}
    for one in there:
        if one.end_reason is None:
            lengths.setdefault(one.group_id, []).append(one.response_length)
    assert found.open_lengths == lengths
    assert found.unfinished == len(there) - len(ended)
    new = [one for one in ended if version in one.policy_versions]
    assert found.finished_now == len(new)
    assert found.repeat_stops == sum(one.end_reason == "repeat" for one in new)
    sampled = sum(int((one.policy_versions == version).sum()) for one in there)
    assert found.tokens == found.tokens_drawn == found.decode_steps == steps == sampled
