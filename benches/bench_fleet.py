"""Rollout workers: CPU a token against one engine, the master's share, and verdicts on the way.

    pytest benches/bench_fleet.py                # about 1 CPU-minute

A model of the default run's size with random weights answers 32 groups of 8; a stop token ends the
answers, about 64 tokens long. CPU seconds of the master and of both workers count.
"""

import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config, RolloutConfig
from kimi_core.reward.groups import GroupScorer
from kimi_core.rollout import wire
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.fleet import Fleet
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.phase import begin_group, roll_out
from kimi_core.types import Prompt, Sampling, Segment

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS, SAMPLES, ROWS = 32, 8, 32
VOCAB, STOP = 64, 1
PROMPT = Prompt(0, "", "")
SAMPLING = Sampling(1.0, seed=1, stop_token_ids=frozenset({STOP}), stream_tokens=64)


def settings(workers: int = 1, rows: int = ROWS) -> RolloutConfig:
    return RolloutConfig(workers=workers, batch_rows=rows, max_response_tokens=400)


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine_of(model) -> Iterator[dict[int, Engine]]:
    """The engine with so many workers."""
    engines, publishers = {}, []
    for workers in (1, 2):
        engines[workers], publisher = load_engine(model, settings(workers), 420)
        publisher.publish(model.named_parameters(), 0)
        engines[workers].serve(0)
        publishers.append(publisher)
    yield engines
    for engine, publisher in zip(engines.values(), publishers, strict=True):
        engine.close()
        publisher.close()


@pytest.fixture
def new_buffer(tmp_path):
    numbers = count()

    def make(groups: int = GROUPS, samples: int = SAMPLES, tokens: int = 1 << 19) -> RolloutBuffer:
        path = tmp_path / f"{next(numbers)}.bin"
        buffer = RolloutBuffer.create(
            path, capacity_tokens=tokens, max_trajectories=groups * samples
        )
        rng = np.random.default_rng(0)
        for group in range(groups):
            ids = rng.integers(2, VOCAB, 12).astype(np.int32)
            begin_group(buffer, PROMPT, ids, group_id=group, samples=samples)
        return buffer

    return make


def cpu_of(pids: list[int]) -> float:
    """CPU seconds that other processes have used."""
    ticks = 0
    for pid in pids:
        ticks += sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )
    return ticks / os.sysconf("SC_CLK_TCK")


def test_cpu_a_token_of_two_workers(engine_of, new_buffer, ratios):
    fleet = engine_of[2]
    pids = [worker.pid for worker in fleet._workers]
    cost, tokens = {}, {}
    for workers in (1, 2, 1, 2, 1, 2):
        with new_buffer() as buffer:
            before, others = time.process_time(), cpu_of(pids)
            found = roll_out(engine_of[workers], buffer, settings(workers), SAMPLING)
            own, theirs = time.process_time() - before, cpu_of(pids) - others
            if own + theirs < sum(cost.get(workers, (np.inf, 0))):
                cost[workers] = own, theirs
            tokens[workers] = [one.token_ids.tolist() for one in found.finished]
    assert tokens[1] == tokens[2]
    number = sum(map(len, tokens[1])) - 12 * GROUPS * SAMPLES
    one, two = sum(cost[1]), sum(cost[2])
    detail = f"{number / one:,.0f} against {number / two:,.0f} tokens/CPU-s"
    ratios.record("two workers", "in process, same rows", one / two, 1 / 1.35, detail)
    share = cost[2][0] / two
    ratios.record("5 %", "the master's share", 0.05 / share, 1.0, f"{share:.1%} of the CPU time")


class Stream:
    """Implements ``Worker``: has its messages ready, packed as a worker packs them."""

    number, policy_version, steps, ready, joins = 0, 0, 0, True, False

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages
        self._fed = False
        self._read, write = os.pipe()
        os.write(write, b"x")

    def fileno(self) -> int:
        return self._read

    def take(self) -> list[wire.Message]:
        if not self._fed:
            return []
        taken, self._messages = self._messages[:8], self._messages[8:]
        return [wire.unpacked(message, 0) for message in taken]

    def feed(self, requests: object) -> None:
        self._fed = True

    def nothing(self, *_: object) -> None:
        pass

    start = serve = begin = stop = check = close = nothing


def packed(trajectories: int, rounds: int, together: int = 64, tokens: int = 64) -> list[bytes]:
    """Messages of ``together`` segments; each trajectory gets ``rounds`` of them and then ends."""
    ids, logprobs = np.full(tokens, 3, np.int32), np.full(tokens, -0.5, np.float32)
    messages = []
    for number in range(rounds):
        reason = "stop" if number == rounds - 1 else None
        for first in range(0, trajectories, together):
            segments = [
                Segment(key, ids, logprobs, 0, reason) for key in range(first, first + together)
            ]
            messages.append(wire.packed(wire.SEGMENTS, call=1, segments=segments))
    return messages


def test_the_master_alone(new_buffer, ratios):
    trajectories, rounds = 2048, 32
    messages, best = packed(trajectories, rounds), np.inf
    config = RolloutConfig(max_response_tokens=64 * rounds + 1)
    for _ in range(5):
        fleet = Fleet(
            [Stream(messages)], batch_rows=ROWS, vocabulary=VOCAB, context=None, exact=True
        )
        fleet._started = True
        with new_buffer(trajectories // SAMPLES, tokens=trajectories * 2560) as buffer:
            start = time.process_time()
            found = roll_out(fleet, buffer, config, SAMPLING)
            best = min(best, time.process_time() - start)
        assert len(found.finished) == trajectories and found.tokens == 64 * rounds * trajectories
    rate = trajectories * rounds / best
    ratios.record(
        "segments/CPU-s", "300,000", rate / 300_000, 1.0, f"{rate:,.0f}, 64 a message, stored"
    )


def test_verdicts_on_the_way(engine_of, new_buffer, ratios):
    """Four threads take as long over all verdicts as the rollout takes."""
    config = Config.model_validate({"reward": {"workers": 4}})
    engine = engine_of[1]

    def phase(verdict_s: float, *, on_the_way: bool) -> float:
        def reward(*_: object) -> float:
            time.sleep(verdict_s)
            return 0.0

        scorer = GroupScorer(config, reward, lambda ids: "")
        judge = scorer.begin if on_the_way else (lambda prompt, one: None)
        with new_buffer() as buffer:
            start = time.perf_counter()
            found = roll_out(
                engine, buffer, settings(), SAMPLING, on_end=lambda one: judge(PROMPT, one)
            )
            scorer.judge([(PROMPT, one) for one in found.finished])
            return time.perf_counter() - start

    alone = phase(0, on_the_way=False)
    verdict_s = 4 * alone / (GROUPS * SAMPLES)
    after, meanwhile = (phase(verdict_s, on_the_way=way) for way in (False, True))
    detail = f"rollout {alone:.1f} s, verdicts after it {after:.1f} s, on the way {meanwhile:.1f} s"
    ratios.record(
        "verdicts on the way", "the longer of the two", alone / meanwhile, 1 / 1.15, detail
    )
