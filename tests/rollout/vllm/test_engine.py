"""The vLLM engine beside plain forward passes, and beside the embedded engine."""

import asyncio

import numpy as np
import pytest
from vllm_testing import (
    GREEDY,
    MARKS,
    SAMPLED,
    SMALL_CACHE,
    PublishedEngine,
    after,
    assert_logprobs_are_those_of,
    gathered,
    joined,
    next_version,
    perturb,
    requests_of,
    served,
    tiny_model,
)

from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Request, Sampling

pytestmark = MARKS


@pytest.fixture(scope="module")
def engine():
    engine = PublishedEngine(tiny_model(), batch_rows=32, options=SMALL_CACHE, policy_version=3)
    yield engine
    engine.close()


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
    engine.publisher.publish(engine.model.named_parameters(), before + 1)

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
        engine.serve(engine.policy_version + 1)
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
