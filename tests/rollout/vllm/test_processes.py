"""The life of vLLM's processes: killed, hung, not started, orphaned; and what that costs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from vllm_testing import (
    GREEDY,
    MARKS,
    SMALL_CACHE,
    PublishedEngine,
    assert_logprobs_are_those_of,
    gathered,
    joined,
    next_version,
    processes_of,
    requests_of,
    served,
    tiny_model,
)

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import EngineFailed
from kimi_core.rollout.phase import begin_group, roll_out
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.rollout.vllm.server import ServerDown
from kimi_core.types import Prompt, Request, Sampling

pytestmark = MARKS


@pytest.fixture(scope="module")
def engine():
    engine = PublishedEngine(tiny_model(), batch_rows=32, options=SMALL_CACHE, policy_version=3)
    yield engine
    engine.close()


@pytest.mark.parametrize("victim", ["engine core", "worker"])
def test_a_kill_in_mid_rollout_costs_unacknowledged_tokens_and_nothing_else(
    engine, victim, tmp_path
):
    next_version(engine)  # Not the version that vLLM was started with.
    config = RolloutConfig(samples_per_prompt=2, max_response_tokens=150, stream_tokens=8)
    sampling = Sampling(0, 0, frozenset(), stream_tokens=8)
    prompts = [request.token_ids for request in requests_of(12)[::2]]
    gathered(engine.generate(requests_of(2), GREEDY))
    starts, core_and_worker = engine.starts, processes_of(engine)
    with RolloutBuffer.create(
        tmp_path / "buffer.bin", capacity_tokens=1 << 16, max_trajectories=64
    ) as buffer:
        for index, prompt in enumerate(prompts):
            begin_group(buffer, Prompt(index, "", ""), prompt, group_id=index, samples=2)

        def killing(requests, sampling):
            for count, segments in enumerate(VLLMEngine.generate(engine, requests, sampling)):
                if count == 1:
                    os.kill(core_and_worker[victim == "worker"], signal.SIGKILL)
                yield segments

        engine.generate = killing
        try:
            report = roll_out(engine, buffer, config, sampling)
        finally:
            del engine.generate
        assert engine.starts == starts + 1
        assert report.finished_now == 12 and report.tokens == 12 * 150
        assert served(engine)["version"] == engine.policy_version
        twin = TorchEngine(engine.model, batch_rows=16)
        requests = [Request(i, prompts[i // 2], len(prompts[i // 2]), 150, 150) for i in range(12)]
        expected = gathered(twin.generate(requests, sampling))
        for index, key in enumerate(buffer.finished()):
            trajectory = buffer.read(key)
            assert trajectory.response_ids.tolist() == joined(expected[index])[0]
            assert set(trajectory.policy_versions[trajectory.prompt_length :]) == {
                engine.policy_version
            }


def test_tokens_that_come_along_with_an_error_are_handed_over(engine, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    sampling = Sampling(0, 0, frozenset(), stream_tokens=4)
    requests = requests_of(6)
    expected = gathered(engine.generate(requests, sampling))
    follow, failed = VLLMEngine._follow, set()

    async def failing(self, server, response, sampling, queue):
        key = response.request.trajectory_id
        if key in failed:
            return await follow(self, server, response, sampling, queue)
        failed.add(key)
        tokens, logprobs = joined(expected[key])
        given = SimpleNamespace(logprobs=logprobs[:9].tolist())
        completion = SimpleNamespace(
            token_ids=tokens[:9], logprobs=given, finish_reason=None, weight_versions=None
        )
        queue.put_nowait((response, SimpleNamespace(outputs=[completion])))
        raise EngineDeadError

    monkeypatch.setattr(VLLMEngine, "_follow", failing)
    monkeypatch.setattr(VLLMEngine, "_stop", lambda self: None)  # It is alive.
    parts = gathered(engine.generate(requests, sampling))
    assert failed == parts.keys()
    for key, segments in expected.items():
        assert joined(parts[key])[0] == joined(segments)[0]


def test_an_engine_that_died_between_calls_starts_with_the_newest_weights(engine):
    gathered(engine.generate(requests_of(2), GREEDY))
    os.kill(processes_of(engine)[0], signal.SIGKILL)
    next_version(engine)
    requests = requests_of(4)
    parts = gathered(engine.generate(requests, GREEDY))
    assert_logprobs_are_those_of(engine.model, requests, parts, GREEDY)
    assert served(engine)["version"] == engine.policy_version


def test_a_wait_has_a_deadline_and_says_what_for(engine):
    gathered(engine.generate(requests_of(2), GREEDY))
    patience, engine.server.timeout_s = engine.server.timeout_s, 0.3
    try:
        with pytest.raises(ServerDown, match=r"within 0\.3 s .*during the wait for the moon"):
            engine.server.wait(asyncio.sleep(60), "the moon")
    finally:
        engine.server.timeout_s = patience


def test_interrupts_are_for_the_trainer_alone(engine):
    requests = requests_of(4)
    expected = gathered(engine.generate(requests, GREEDY))
    starts = engine.starts
    for pid in processes_of(engine):
        os.kill(pid, signal.SIGINT)
    again = gathered(engine.generate(requests, GREEDY))
    assert engine.starts == starts
    assert {k: joined(v)[0] for k, v in again.items()} == {
        k: joined(v)[0] for k, v in expected.items()
    }


def test_a_hung_engine_is_replaced_and_twice_ends_the_call(engine, monkeypatch):
    gathered(engine.generate(requests_of(2), GREEDY))
    core, worker = processes_of(engine)
    engine.server.timeout_s = 0.5
    os.kill(worker, signal.SIGSTOP)
    # The replacement does not start, either.
    monkeypatch.setattr(
        VLLMEngine, "_started", _raising_from_the_second_call_on(VLLMEngine._started)
    )
    with pytest.raises(EngineFailed, match="the stand-in is down; this happened twice"):
        gathered(engine.generate(requests_of(2), GREEDY))
    assert engine.server is None
    for pid in (core, worker):
        assert _gone(pid)
    monkeypatch.undo()
    requests = requests_of(4)
    parts = gathered(engine.generate(requests, GREEDY))
    assert_logprobs_are_those_of(engine.model, requests, parts, GREEDY)


def _raising_from_the_second_call_on(started):
    calls = []

    def stand_in(self):
        calls.append(self)
        if len(calls) > 1:
            raise ServerDown("the stand-in is down")
        return started(self)

    return stand_in


def test_no_socket_stays_open_where_all_tasks_had_ended(engine):
    """At the end of the process ZeroMQ would wait for ever for such a socket.

    The last with this engine, because another would have to start it.
    """
    gathered(engine.generate(requests_of(1), GREEDY))
    server, engine.server = engine.server, None
    resources = server.llm.engine_core.resources
    tasks = asyncio.all_tasks(server.loop)
    for task in tasks:
        task.cancel()
    server.loop.run_until_complete(asyncio.wait(tasks))
    server.close(kill=True)
    assert resources.input_socket.closed and resources.output_socket.closed


def test_a_start_that_fails_is_an_error_that_says_so():
    engine = PublishedEngine(tiny_model(), batch_rows=4, options={"kv_cache_memory_bytes": 1000})
    with pytest.raises(EngineFailed, match=r"vLLM did not start within 600 s"):
        gathered(engine.generate(requests_of(1), GREEDY))
    engine.close()


def test_options_that_vllm_does_not_know_are_named():
    engine = PublishedEngine(tiny_model(), batch_rows=4, options={"max_tokens_at_all": 3})
    with pytest.raises(ValueError, match=r"rollout\.vllm\.args: .*max_tokens_at_all"):
        gathered(engine.generate(requests_of(1), GREEDY))
    engine.close()


OWNER = """
import sys
sys.path.insert(0, {tests!r})
from vllm_testing import (
    GREEDY, SMALL_CACHE, PublishedEngine, gathered, processes_of, requests_of, tiny_model
)

if __name__ == "__main__":
    engine = PublishedEngine(tiny_model(), batch_rows=4, options=SMALL_CACHE)
    gathered(engine.generate(requests_of(1), GREEDY))
    print(*processes_of(engine), flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_vllm_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(tests=str(Path(__file__).parents[2])))
    arenas = set(_arena_folders())
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        line = owner.stdout.readline()
        while line and not line[0].isdigit():
            line = owner.stdout.readline()
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        owner.kill()
        owner.wait()
        for pid in pids:
            assert _gone(pid)
    # Other tests have such folders for a moment, while they make an arena.
    assert _soon(lambda: set(_arena_folders()) <= arenas)


def _arena_folders():
    return [path.name for path in Path("/dev/shm").glob("kimi_core-*")]


def _gone(pid: int) -> bool:
    def gone() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return _soon(gone)


def _soon(so: Callable[[], bool], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if so():
            return True
        time.sleep(0.05)
    return False
