"""vLLM and a trainer that take turns on one device: the order, the memory, and the same tokens."""

import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
from vllm_testing import (
    MARKS,
    SMALL_CACHE,
    PublishedEngine,
    next_version,
    processes_of,
    tiny_model,
    tokens_of,
    tokens_of_two_versions,
)

from kimi_core.cluster.turns import Turns

pytestmark = [*MARKS, pytest.mark.nightly]

GONE_S = 20
"""Longest wait for the memory of a process that has ended."""


class Idle:
    """A trainer that has nothing to free."""

    def rest(self) -> None:
        pass


def resident(pids: list[int]) -> int:
    """Bytes of memory of processes, as far as they are still there."""
    found = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).memory_info().rss
    return found


def assert_gone(pids: list[int]) -> None:
    ends = time.monotonic() + GONE_S
    while resident(pids):
        assert time.monotonic() < ends, f"{pids} still have memory"
        time.sleep(0.05)


def test_memory_is_gone_while_vllm_sleeps_and_tokens_are_the_same():
    expected = tokens_of_two_versions()
    engine = PublishedEngine(tiny_model(), batch_rows=8, options=SMALL_CACHE, hybrid=True)
    turns = Turns(engine, Idle(), shared=True)
    for version, tokens in enumerate(expected):
        assert engine.server is None
        with turns.engine():
            assert engine.server is not None, "it starts when it wakes, not with the first request"
            pids = [*processes_of(engine)]
            assert resident(pids) > 100e6
            with pytest.raises(RuntimeError, match="both share the device"), turns.trainer():
                pass
            assert tokens_of(engine) == tokens
            assert (engine.policy_version, engine.restarts) == (version, 0)
            steps = engine.decode_steps
        assert_gone(pids)
        engine.sleep()  # A second time changes nothing.
        assert engine.decode_steps == steps > 0
        if version == 0:
            with turns.trainer():
                next_version(engine)
    took = turns.seconds()
    assert took["wake"] > took["sleep"] > 0
    engine.close()


def test_a_death_while_it_wakes_is_a_restart():
    engine = PublishedEngine(tiny_model(), batch_rows=8, options=SMALL_CACHE, hybrid=True)
    connect = engine._started

    def dies():
        server = connect()
        if engine.starts == 1:
            os.kill(server.pids[0], signal.SIGKILL)
            server.serve(engine.policy_version)  # Raises ServerDown.
        return server

    engine._started = dies
    engine.wake()
    assert engine.server is None
    assert len(tokens_of(engine)) == 12 and engine.restarts == 1
    engine.close()
