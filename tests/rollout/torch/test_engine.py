"""The embedded engine beside plain forward passes of the same model."""

from dataclasses import replace
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
import transformers as hf

from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Request, Sampling, Segment

VOCAB, CONTEXT, STOP = 32, 96, 1
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
LLAMA_LIKE = {**SHAPE, **HEADS, "head_dim": 8, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA_LIKE),
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE, sliding_window=None),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        **SHAPE, num_attention_heads=4, max_position_embeddings=CONTEXT
    ),
    # Caps on attention scores (eager only) and logits, and every other layer with a window.
    "gemma2": lambda: hf.Gemma2Config(
        **{**LLAMA_LIKE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        sliding_window=CONTEXT,
    ),
    "cohere": lambda: hf.CohereConfig(**LLAMA_LIKE, logit_scale=0.5),
}
WINDOWS = {
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE, sliding_window=10),
    "gemma2": lambda: hf.Gemma2Config(
        **LLAMA_LIKE, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, sliding_window=10
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **LLAMA_LIKE, sliding_window=10, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **LLAMA_LIKE, sliding_window=10, num_local_experts=4, num_experts_per_tok=2
    ),
}
GREEDY = Sampling(temperature=0, seed=0, stop_token_ids=frozenset({STOP}))
SAMPLED = Sampling(temperature=0.8, seed=5, stop_token_ids=frozenset({STOP}))


@cache
def model_of(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    implementation = "eager" if name == "gemma2" else "sdpa"
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # fresh models are nearly uniform: mistakes would not show
                parameter.mul_(8)
    return model


def windowed(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    implementation = "sdpa" if name in ("mistral", "gemma3") else "eager"
    model = hf.AutoModelForCausalLM.from_config(WINDOWS[name](), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    ids = torch.arange(30)[None]
    whole = type(model)(type(model.config)(**{**model.config.to_dict(), "sliding_window": 90}))
    whole.set_attn_implementation(implementation)
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():  # otherwise a lost window would not show
        assert (model(ids).logits - whole(ids).logits)[0, -1].abs().max() > 1e-3
    return model


def requests_of(n: int, budget: int = 40, remaining: int = 40, twins: int = 2) -> list[Request]:
    """Contexts of mixed lengths, each shared by ``twins`` trajectories."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(2, VOCAB, rng.integers(1, 20)).astype(np.int32) for _ in range(n)]
    return [
        Request(i, contexts[i // twins], len(contexts[i // twins]), budget, remaining)
        for i in range(n)
    ]


def run(engine: TorchEngine, requests: list[Request], sampling: Sampling) -> dict[int, Segment]:
    segments = list(chain.from_iterable(engine.generate(requests, sampling)))
    assert sorted(s.trajectory_id for s in segments) == sorted(r.trajectory_id for r in requests)
    return {segment.trajectory_id: segment for segment in segments}


def run_in_parts(
    engine: TorchEngine, requests: list[Request], sampling: Sampling
) -> dict[int, list[Segment]]:
    """Iterations of partial rollouts until every trajectory has ended."""
    parts: dict[int, list[Segment]] = {request.trajectory_id: [] for request in requests}
    while requests:
        segments = run(engine, requests, sampling)
        still_open = []
        for request in requests:
            segment = segments[request.trajectory_id]
            parts[request.trajectory_id].append(segment)
            if segment.end_reason is None:
                assert len(segment) == request.budget
                token_ids = np.concatenate([request.token_ids, segment.token_ids])
                remaining = request.remaining - len(segment)
                still_open.append(
                    Request(
                        *(request.trajectory_id, token_ids, request.prompt_length),
                        *(request.budget, remaining),
                    )
                )
        requests = still_open
    return parts


def plain_logprobs(model: hf.PreTrainedModel, request: Request, segment: Segment, temperature=0.0):
    """Log-probs of a segment from one forward pass with no cache and no padding."""
    token_ids = np.concatenate([request.token_ids, segment.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(token_ids)[None]).logits[0].double()
    logprobs = (logits / (temperature or 1)).log_softmax(-1)[len(request.token_ids) - 1 : -1]
    new = torch.from_numpy(token_ids[len(request.token_ids) :])
    return logprobs.gather(1, new[:, None])[:, 0].numpy(), logprobs.argmax(-1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_plain_forward_pass(name):
    model = model_of(name)
    requests = requests_of(9)
    # Fewer rows than requests: rows end, are compacted away, and others enter.
    engine = TorchEngine(model, batch_rows=4, policy_version=3)
    for sampling in (GREEDY, SAMPLED):
        segments = run(engine, requests, sampling)
        for request in requests:
            segment = segments[request.trajectory_id]
            expected, best = plain_logprobs(model, request, segment, sampling.temperature)
            np.testing.assert_allclose(segment.logprobs, expected, atol=1e-4)
            if sampling.temperature == 0:
                assert segment.token_ids.tolist() == best.tolist()
            assert segment.policy_version == 3
            assert segment.token_ids.dtype == np.int32 and segment.logprobs.dtype == np.float32


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_partial_rollouts_give_the_same_tokens(sampling):
    engine = TorchEngine(model_of("llama"), batch_rows=6)
    whole = run(engine, requests_of(16), sampling)
    parts = run_in_parts(engine, requests_of(16, budget=7), sampling)
    assert any(len(segments) > 1 for segments in parts.values())
    for trajectory_id, segment in whole.items():
        segments = parts[trajectory_id]
        joined = np.concatenate([part.token_ids for part in segments])
        assert joined.tolist() == segment.token_ids.tolist()
        logprobs = np.concatenate([part.logprobs for part in segments])
        np.testing.assert_allclose(logprobs, segment.logprobs, atol=1e-5)
        assert segments[-1].end_reason == segment.end_reason


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_tokens_do_not_depend_on_the_batch(batch_rows):
    expected = run(TorchEngine(model_of("llama"), batch_rows=16), requests_of(16), SAMPLED)
    requests = requests_of(16)
    np.random.default_rng(1).shuffle(requests)
    given = run(TorchEngine(model_of("llama"), batch_rows=batch_rows), requests, SAMPLED)
    for trajectory_id, segment in expected.items():
        assert given[trajectory_id].token_ids.tolist() == segment.token_ids.tolist()


def test_twins_of_a_prompt_differ_and_the_seed_counts():
    engine = TorchEngine(model_of("llama"), batch_rows=16)
    segments = run(engine, requests_of(8, twins=8), SAMPLED)
    assert len({tuple(segment.token_ids) for segment in segments.values()}) == 8
    other = run(engine, requests_of(8, twins=8), Sampling(0.8, 6, frozenset({STOP})))
    assert segments[0].token_ids.tolist() != other[0].token_ids.tolist()


def test_why_a_segment_ends():
    model = model_of("llama")
    context = np.array([5, 9, 3], np.int32)
    free = Sampling(0, 0, frozenset())
    tokens = run(TorchEngine(model, batch_rows=1), [Request(0, context, 3, 20, 20)], free)
    tokens = tokens[0].token_ids
    first = tokens.tolist().index(tokens[4])  # token 4 may have come before
    stopping = Sampling(0, 0, frozenset({int(tokens[4])}))
    cases = [
        # (budget, remaining, sampling) -> (length, reason)
        ((20, 20, free), (20, "length")),
        ((7, 20, free), (7, None)),
        ((20, 7, free), (7, "length")),
        ((7, 7, free), (7, "length")),
        ((20, 20, stopping), (first + 1, "stop")),
        ((first + 1, 20, stopping), (first + 1, "stop")),
        ((first + 1, first + 1, stopping), (first + 1, "stop")),
        ((1, 20, Sampling(0, 0, frozenset({int(tokens[0])}))), (1, "stop")),
    ]
    engine = TorchEngine(model, batch_rows=2)
    for (budget, remaining, sampling), (length, reason) in cases:
        segment = run(engine, [Request(0, context, 3, budget, remaining)], sampling)[0]
        assert (len(segment), segment.end_reason) == (length, reason)
        assert segment.token_ids.tolist() == tokens[:length].tolist()


def test_budgets_are_per_row():
    requests = [
        Request(i, np.array([5, 9, 3], np.int32), 3, budget, 60)
        for i, budget in enumerate([1, 30, 2, 17, 60])
    ]
    order = []
    engine = TorchEngine(model_of("llama"), batch_rows=5)
    for segment in chain.from_iterable(engine.generate(requests, Sampling(1.0, 0, frozenset()))):
        assert len(segment) == requests[segment.trajectory_id].budget
        order.append(segment.trajectory_id)
    assert order == [0, 2, 3, 1, 4]  # as they end


@pytest.mark.parametrize("stream", [1, 3, 7, 100])
def test_streaming_hands_the_same_tokens_over_in_parts(stream):
    """Every ``stream`` tokens, those of one step together, and the last part says how it ended."""
    engine = TorchEngine(model_of("llama"), batch_rows=4)
    requests = requests_of(9, budget=20)
    whole = run(engine, requests, SAMPLED)
    parts: dict[int, list[Segment]] = {request.trajectory_id: [] for request in requests}
    for segments in engine.generate(requests, replace(SAMPLED, stream_tokens=stream)):
        assert len({segment.trajectory_id for segment in segments}) == len(segments) > 0
        for segment in segments:
            parts[segment.trajectory_id].append(segment)
    for key, segments in parts.items():
        assert (
            np.concatenate([s.token_ids for s in segments]).tolist()
            == whole[key].token_ids.tolist()
        )
        assert (
            np.concatenate([s.logprobs for s in segments]).tolist() == whole[key].logprobs.tolist()
        )
        assert [len(s) for s in segments[:-1]] == [stream] * (len(segments) - 1)
        assert 0 < len(segments[-1]) <= stream
        assert [s.end_reason for s in segments[:-1]] == [None] * (len(segments) - 1)
        assert segments[-1].end_reason == whole[key].end_reason


@pytest.mark.parametrize("budget", [100, 5])
def test_repeats_end_the_response_across_segments(budget):
    pytest.importorskip("kimi_core._C")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit is 0: greedy says token 0 for ever
    window, count = 4, 3
    sampling = Sampling(0, 0, frozenset({STOP}), repeat_window=window, repeat_count=count)
    # The zeros of the prompt do not count: repeats are looked for in the response.
    requests = [Request(i, np.zeros(8 + i, np.int32), 8 + i, budget, 80) for i in range(3)]
    for parts in run_in_parts(TorchEngine(model, batch_rows=2), requests, sampling).values():
        assert sum(len(part) for part in parts) == window + count - 1  # occurrences overlap
        assert [part.end_reason for part in parts] == [None] * (len(parts) - 1) + ["repeat"]


def test_weights_are_the_trainers_own_and_its_mode_comes_back():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)).train()
    engine = TorchEngine(model, batch_rows=2)
    assert model.training
    requests = requests_of(4)
    before = run(engine, requests, GREEDY)
    assert model.training
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    after = run(engine, requests, GREEDY)
    assert before[0].token_ids.tolist() != after[0].token_ids.tolist()
    iterator = engine.generate(requests, GREEDY)
    next(iterator)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    iterator.close()
    assert model.training
    # And it can be trained as if nothing had happened.
    model(input_ids=torch.tensor([[2, 3]]), labels=torch.tensor([[2, 3]])).loss.backward()


def test_a_large_vocabulary_takes_its_own_path_to_the_same_log_probs(monkeypatch):
    torch.manual_seed(0)
    vocab = 1 << 19
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA_LIKE, "vocab_size": vocab})).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(vocab))
    engine = TorchEngine(model, batch_rows=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # after the engine was made: it must read the newest weights
    requests = requests_of(4, budget=6, remaining=6)
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda _: pytest.fail("not its own path"))
        segments = run(engine, requests, SAMPLED)
    for request in requests:
        segment = segments[request.trajectory_id]
        expected, _ = plain_logprobs(model, request, segment, SAMPLED.temperature)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(4, np.zeros(0, np.int32), 0, 5, 5), ["trajectory 4", "empty"]),
        (Request(4, np.zeros(3, np.int32), 3, 0, 5), ["trajectory 4", "budget = 0"]),
        (Request(4, np.zeros(3, np.int32), 3, 5, 0), ["trajectory 4", "remaining = 0"]),
        (Request(4, np.full(3, VOCAB, np.int32), 3, 5, 5), ["trajectory 4", "vocabulary"]),
        (
            Request(4, np.zeros(60, np.int32), 3, 40, 37),
            ["trajectory 4", "60", "37", str(CONTEXT), "max_response_tokens"],
        ),
    ],
)
def test_bad_requests_are_refused_before_anything_is_generated(request_, words):
    engine = TorchEngine(model_of("llama"), batch_rows=2)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        engine.generate([*requests_of(2), request_], GREEDY)
    assert all(word in str(error.value) for word in words)


def test_the_whole_context_can_be_used():
    request = Request(0, np.full(CONTEXT - 10, 3, np.int32), 1, 10, 10)
    engine = TorchEngine(model_of("gpt2"), batch_rows=1)
    assert len(run(engine, [request], Sampling(1.0, 0, frozenset()))[0]) == 10


def test_nothing_asked_nothing_done():
    assert list(TorchEngine(model_of("llama"), batch_rows=1).generate([], GREEDY)) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", *WINDOWS])
def test_a_context_in_chunks_equals_one_pass(name, monkeypatch, caplog):
    """Chunks shorter and longer than the window; twins share a context, others lie between."""
    model = windowed(name) if name in WINDOWS else model_of(name)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(2, VOCAB, n).astype(np.int32) for n in (40, 40, 29, 3, 14, 7)]
    requests = [Request(i, contexts[i // 2], len(contexts[i // 2]), 6, 6) for i in range(12)]
    caplog.set_level("WARNING", "kimi_core")
    engine = TorchEngine(model, batch_rows=5)
    assert "one pass" not in caplog.text  # All that this model takes fits into one.
    whole = run(engine, requests, SAMPLED)
    for most in (6, 13):
        monkeypatch.setattr("kimi_core.rollout.torch.engine.PREFILL_TOKENS", most)
        passes = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda *inputs, seen=passes: seen.append(inputs[1][0].numel())
        )
        parts = run(engine, requests, SAMPLED)
        hook.remove()
        assert (max(passes) <= most) == engine.split
        for key, segment in whole.items():
            assert parts[key].token_ids.tolist() == segment.token_ids.tolist()
            np.testing.assert_allclose(parts[key].logprobs, segment.logprobs, atol=1e-5)
        TorchEngine(model, batch_rows=1)
        assert ("one pass" in caplog.text) != engine.split
        caplog.clear()


@pytest.mark.parametrize("name", WINDOWS)
def test_responses_longer_than_a_sliding_window_equal_a_plain_forward_pass(name):
    model = windowed(name)
    requests = requests_of(6)
    segments = run(TorchEngine(model, batch_rows=4), requests, SAMPLED)
    assert max(len(segment) for segment in segments.values()) > 10
    for request in requests:
        segment = segments[request.trajectory_id]
        ids = np.concatenate([request.token_ids, segment.token_ids])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None].long()).logits[0] / SAMPLED.temperature
        plain = logits.log_softmax(-1)[len(request.token_ids) - 1 : -1]
        plain = plain.gather(1, torch.from_numpy(segment.token_ids)[:, None].long())[:, 0]
        assert np.abs(segment.logprobs - plain.numpy()).max() < 2e-5


def test_a_model_whose_positions_turn_with_the_longest_row_is_refused():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = hf.Phi3Config(
        **{**LLAMA_LIKE, "pad_token_id": 0},
        original_max_position_embeddings=24,
        rope_parameters={**rope, "rope_theta": 1e4, "original_max_position_embeddings": 24},
    )
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM.*original contexts.*24"):
        TorchEngine(model, batch_rows=2)


SMALL = {"vocab_size": VOCAB, "hidden_size": 32}
UNFIT = {
    "bloom": (lambda: hf.BloomConfig(**SMALL, n_layer=2, n_head=4), "ALiBi"),
    "falcon": (
        lambda: hf.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        "ALiBi",
    ),
    "llama4": (
        lambda: hf.Llama4TextConfig(
            **LLAMA_LIKE, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=8
        ),
        "Llama4ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_models_are_refused_with_the_reason_and_what_to_use(name):
    config, reason = UNFIT[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config())
    with pytest.raises(ValueError, match=f"embedded engine cannot run.*{reason}.*Use such a model"):
        TorchEngine(model, batch_rows=2)


def test_models_with_another_state_are_refused():
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="mamba"):
        TorchEngine(hf.MambaForCausalLM(config), batch_rows=1)


def test_models_that_ignore_what_they_are_told_are_refused(monkeypatch):
    model = model_of("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **k: forward(**{**k, "position_ids": None}))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*position_ids"):
        TorchEngine(model, batch_rows=1)
