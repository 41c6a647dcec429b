"""Worker processes: they serve what the arena has, and one that stops is replaced."""

import os
import signal
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from fleet_workers import CONTEXT, SAMPLED, VOCAB, model

from kimi_core.config import RolloutConfig
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Request


def requests_of(n: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(i, rng.integers(2, VOCAB, 4).astype(np.int32), 4, 80, CONTEXT - 10)
        for i in range(n)
    ]


def gathered(stream, at_first=lambda: None) -> dict[int, list[int]]:
    tokens = defaultdict(list)
    for number, segments in enumerate(stream):
        if number == 0:
            at_first()
        for segment in segments:
            tokens[segment.trajectory_id] += segment.token_ids.tolist()
    return dict(tokens)


@pytest.mark.slow
@pytest.mark.nightly
def test_workers_follow_the_arena_and_one_that_hangs_is_replaced():
    read = model()
    twin = TorchEngine(model(), batch_rows=8)
    engine, publisher = load_engine(read, RolloutConfig(workers=2, batch_rows=8), CONTEXT)
    sampling = replace(SAMPLED, stop_token_ids=frozenset(), stream_tokens=2)
    try:
        publisher.publish(read.named_parameters(), 0)
        engine.serve(0)
        assert gathered(engine.generate(requests_of(6), sampling)) == gathered(
            twin.generate(requests_of(6), sampling)
        )

        with torch.no_grad():
            for one in (read, twin.model):
                one.get_output_embeddings().weight.mul_(0.5)
        publisher.publish(read.named_parameters(), 1)
        engine.serve(1)
        stopped = engine._workers[1].pid
        for worker in engine._workers:
            worker.silent_s = 5
        found = gathered(
            engine.generate(requests_of(40), sampling),
            at_first=lambda: os.kill(stopped, signal.SIGSTOP),
        )
        assert found == gathered(twin.generate(requests_of(40), sampling))
        assert engine.restarts >= 1 and engine._workers[1].pid != stopped
    finally:
        engine.close()
        publisher.close()
    assert all(worker.pid == 0 for worker in engine._workers)
