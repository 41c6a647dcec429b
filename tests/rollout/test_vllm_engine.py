"""The vLLM engine beside plain forward passes, and beside the embedded engine."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from vllm_testing import (
    GREEDY,
    MARKS,
    SAMPLED,
    SMALL_CACHE,
    after,
    assert_logprobs_are_those_of,
    gathered,
    joined,
    perturb,
    processes_of,
    requests_of,
    served,
    tiny_model,
)

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import EngineFailed, Request, Sampling
from kimi_core.rollout.torch_engine import TorchEngine
from kimi_core.rollout.vllm_engine import VLLMEngine
from kimi_core.rollout.vllm_server import ServerDown
from kimi_core.rollout.worker import begin_group, roll_out
from kimi_core.types import Prompt

pytestmark = MARKS


@pytest.fixture(scope="module")
def engine():
    engine = VLLMEngine(tiny_model(), batch_rows=32, options=SMALL_CACHE, policy_version=3)
    yield engine
    engine.close()


def next_version(engine):
    perturb(engine.model, engine.policy_version)
    engine.update(engine.policy_version + 1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_trainer_after_each_update(engine, sampling):
    requests = requests_of(12)
    for _ in range(3):
        version = engine.policy_version
        parts = gathered(engine.generate(requests, sampling))
        assert_logprobs_are_those_of(engine.model, requests, parts, sampling)
        assert {p.policy_version for segments in parts.values() for p in segments} == {version}
        assert served(engine)["version"] == version and served(engine)["views"]
        next_version(engine)


@pytest.mark.parametrize("stream_tokens", [0, 5, 40])
@pytest.mark.parametrize(("window", "count"), [(0, 0), (2, 2)])
def test_segments_are_cut_as_the_embedded_engine_cuts_them(engine, stream_tokens, window, count):
    """Budgets, length limits, stop tokens, repeats and streaming, all at once."""
    requests = [
        *requests_of(12, budget=17, remaining=40),
        *(Request(100 + r.trajectory_id, r.token_ids, 2, 30, 23) for r in requests_of(6)),
    ]
    sampling = Sampling(0, 0, frozenset({1, 9}), window, count, stream_tokens)
    twin = TorchEngine(engine.model, batch_rows=32, policy_version=engine.policy_version)
    expected = gathered(twin.generate(requests, sampling))
    parts = gathered(engine.generate(requests, sampling))
    assert parts.keys() == expected.keys()
    reasons = set()
    for key, segments in expected.items():
        assert [(p.token_ids.tolist(), p.end_reason) for p in parts[key]] == [
            (p.token_ids.tolist(), p.end_reason) for p in segments
        ]
        reasons.add(segments[-1].end_reason)
    assert reasons >= ({"stop", "repeat"} if window else {"stop", "length", None})


def test_steps_are_counted(engine):
    before = engine.decode_steps
    gathered(engine.generate(requests_of(8, budget=9), GREEDY))
    assert 9 <= engine.decode_steps - before <= 12  # Contexts may enter over several steps.


def test_partial_rollouts_give_the_same_greedy_tokens_and_reuse_the_prefix(engine):
    requests = requests_of(12)
    whole = gathered(engine.generate(requests, GREEDY))
    parts = gathered(engine.generate(requests_of(12, budget=15), GREEDY))
    reused = engine.server.reused_tokens
    left = [after(r, parts[r.trajectory_id]) for r in requests_of(12)]
    left = [r for r in left if parts[r.trajectory_id][-1].end_reason is None]
    assert left
    rest = gathered(engine.generate(left, GREEDY))
    assert engine.server.reused_tokens > reused
    for key, segments in rest.items():
        tokens, logprobs = joined([*parts[key], *segments])
        expected_tokens, expected = joined(whole[key])
        assert tokens == expected_tokens
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_the_prefix_cache_of_older_weights_is_not_used(engine):
    requests = requests_of(12)
    gathered(engine.generate(requests, GREEDY))
    next_version(engine)
    reused = engine.server.reused_tokens
    # One of each context, so that nothing can be shared among these either.
    parts = gathered(engine.generate(requests[::2], GREEDY))
    assert engine.server.reused_tokens == reused
    assert_logprobs_are_those_of(engine.model, requests[::2], parts, GREEDY)


def test_a_response_over_an_update_has_the_versions_of_its_tokens(engine):
    (request, *_) = requests_of(1, budget=10)
    first = engine.policy_version
    parts = gathered(engine.generate([request], GREEDY))[0]
    next_version(engine)
    again = after(request, parts)
    parts += gathered(engine.generate([again], GREEDY))[0]
    versions = [part.policy_version for part in parts for _ in part.token_ids]
    assert versions == [first] * 10 + [first + 1] * (len(versions) - 10)
    assert_logprobs_are_those_of(engine.model, [again], {0: parts[1:]}, GREEDY)


def test_versions_switch_at_the_right_token_of_a_request_under_way(engine):
    """vLLM's own pause, with the backend's flip, and what vLLM says of the versions."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    request = requests_of(9)[8]
    gathered(engine.generate([request], GREEDY))
    old, new = tiny_model(), tiny_model()
    old.load_state_dict(engine.model.state_dict())
    perturb(engine.model, 99)
    new.load_state_dict(engine.model.state_dict())
    before, server = engine.policy_version, engine.server
    engine._publish(before + 1)

    async def stream():
        params = SamplingParams(
            temperature=0, max_tokens=200, ignore_eos=True, logprobs=0, flat_logprobs=True,
            detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        tokens, logprobs = [], []
        prompt = TokensPrompt(prompt_token_ids=request.token_ids.tolist())
        async for output in server.llm.generate(prompt, params, "under way"):
            completion = output.outputs[0]
            tokens += completion.token_ids
            logprobs += completion.logprobs.logprobs
            if len(tokens) >= 5:
                started.set()
        return tokens, logprobs, completion.weight_versions

    async def begin():
        task = asyncio.ensure_future(stream())
        await started.wait()
        await server.llm.pause_generation(mode="keep")
        return [task]

    started = asyncio.Event()
    (task,) = server.wait(begin(), "the first tokens")
    server.serve(before + 1)
    server.wait(server.llm.resume_generation(), "the rest")
    tokens, logprobs, spans = server.wait(task, "the rest")
    engine.policy_version = before + 1
    assert [span.version for span in spans] == [str(before), str(before + 1)]
    cut = spans[1].start
    assert spans[0].end == cut and 5 <= cut < 200 == spans[1].end
    for model, part in ((old, slice(0, cut)), (new, slice(cut, 200))):
        context = np.concatenate([request.token_ids, tokens[: part.start]]).astype(np.int32)
        asked = Request(0, context, len(request.token_ids), 200, 200)
        answer = _Answer(tokens[part], np.array(logprobs[part]))
        assert_logprobs_are_those_of(model, [asked], {0: [answer]}, GREEDY)


class _Answer:
    def __init__(self, token_ids, logprobs):
        self.token_ids, self.logprobs = token_ids, logprobs


def test_the_same_seed_draws_the_same_tokens_in_any_batch(engine):
    requests = requests_of(12)
    first = gathered(engine.generate(requests, SAMPLED))
    again = gathered(engine.generate(requests[::-1], SAMPLED))
    alone = gathered(engine.generate(requests[4:5], SAMPLED))
    other = gathered(engine.generate(requests, Sampling(0.8, 6, SAMPLED.stop_token_ids)))
    for key, parts in first.items():
        assert joined(again[key])[0] == joined(parts)[0]
    assert joined(alone[4])[0] == joined(first[4])[0]
    assert joined(first[4])[0] != joined(first[5])[0]  # Twins of a prompt.
    assert sum(joined(other[key])[0] == joined(first[key])[0] for key in first) < 3


def test_an_abandoned_call_leaves_the_engine_usable(engine):
    stream = engine.generate(requests_of(12), Sampling(0, 0, frozenset(), stream_tokens=2))
    next(stream)
    with pytest.raises(ValueError, match="while a rollout is under way"):
        engine.update(engine.policy_version + 1)
    with pytest.raises(ValueError, match="generating already"):
        next(engine.generate(requests_of(2), GREEDY))
    stream.close()
    next_version(engine)
    requests = requests_of(4)
    parts = gathered(engine.generate(requests, GREEDY))
    assert_logprobs_are_those_of(engine.model, requests, parts, GREEDY)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Request(4, np.array([], np.int32), 0, 1, 1), "trajectory 4: token_ids is empty"),
        (Request(4, np.array([2], np.int32), 1, 0, 1), "both must be at least 1"),
        (Request(4, np.array([2, 37], np.int32), 1, 1, 1), "vocabulary, 0 to 36"),
        (Request(4, np.full(250, 2, np.int32), 1, 7, 7), "attends to 256 positions"),
    ],
)
def test_impossible_requests_are_refused_at_once(engine, request_, complaint):
    with pytest.raises(ValueError, match=complaint):
        engine.generate([request_], GREEDY)


def test_a_temperature_that_vllm_would_round_is_refused(engine):
    with pytest.raises(ValueError, match=r"temperature = 0\.001: vLLM samples at 0\.01"):
        engine.generate(requests_of(1), Sampling(0.001, 0, frozenset()))


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
        assert report.finished == 12 and report.tokens == 12 * 150
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
        with pytest.raises(ServerDown, match=r"within 0\.3 s .*while the moon was waited for"):
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
    with pytest.raises(EngineFailed, match="the stand-in is down; twice"):
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


def test_a_start_that_fails_is_an_error_that_says_so():
    engine = VLLMEngine(tiny_model(), batch_rows=4, options={"kv_cache_memory_bytes": 1000})
    with pytest.raises(EngineFailed, match=r"vLLM did not start \(it had 600 s\)"):
        gathered(engine.generate(requests_of(1), GREEDY))
    engine.close()


def test_options_that_vllm_does_not_know_are_named():
    engine = VLLMEngine(tiny_model(), batch_rows=4, options={"max_tokens_at_all": 3})
    with pytest.raises(ValueError, match=r"rollout\.vllm\.args: .*max_tokens_at_all"):
        gathered(engine.generate(requests_of(1), GREEDY))
    engine.close()


OWNER = """
import sys
sys.path.insert(0, {tests!r})
from vllm_testing import GREEDY, SMALL_CACHE, gathered, processes_of, requests_of, tiny_model
from kimi_core.rollout.vllm_engine import VLLMEngine

if __name__ == "__main__":
    engine = VLLMEngine(tiny_model(), batch_rows=4, options=SMALL_CACHE)
    gathered(engine.generate(requests_of(1), GREEDY))
    print(*processes_of(engine), flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_vllm_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(tests=str(Path(__file__).parents[1])))
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
    assert set(_arena_folders()) <= arenas


def _arena_folders():
    return [path.name for path in Path("/dev/shm").glob("kimi_core-*")]


def _gone(pid: int, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
