"""An embedded engine on the arena: views, no copies, and the trainer's log-probs in another
process."""

import json
import os
from itertools import chain

import numpy as np
import pytest
import torch
import transformers as hf
from warm import Warm

from kimi_core.models.load import load_pretrained
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Request, Sampling
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import bind
from kimi_core.weights.layout import Layout

GREEDY = Sampling(temperature=0, seed=0, stop_token_ids=frozenset())


@pytest.fixture
def arena(arena_path, layout, model):
    with WeightArena.create(arena_path, layout) as arena:
        arena.publish(model.named_parameters(), version=0)
        yield arena


def train(model: hf.PreTrainedModel, steps: int = 2) -> None:
    """Real optimiser steps, large enough that an engine with old weights would be found out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def inside(lease, parameter: torch.Tensor) -> bool:
    begin = lease.payload.ctypes.data
    return begin <= parameter.data_ptr() < begin + len(lease.payload)


def test_parameters_are_views_of_the_slot_and_stay_tied(arena, tiny, model):
    engine_model = hf.LlamaForCausalLM(tiny)
    binding = bind(engine_model, arena.acquire())
    for version in (1, 2, 3, 4):
        lease = binding.lease
        for name, parameter in engine_model.named_parameters():
            assert parameter.data_ptr() == lease.hf_tensors[name].data_ptr()
            assert inside(lease, parameter) and not parameter.requires_grad
        assert engine_model.lm_head.weight is engine_model.model.embed_tokens.weight
        fused = lease.tensors["model.layers.0.self_attn.qkv_proj.weight"]
        first = engine_model.model.layers[0].self_attn.q_proj.weight
        assert fused.data_ptr() == first.data_ptr()
        train(model)
        assert not torch.equal(first, model.model.layers[0].self_attn.q_proj.weight)
        arena.publish(model.named_parameters(), version=version)
        assert binding.follow() == version
        assert not lease.held
    for name, parameter in engine_model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(engine_model(ids).logits, model(ids).logits)
    lease = binding.lease
    binding.release()
    assert not lease.held
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in engine_model.named_parameters())
    train(engine_model.requires_grad_(True), steps=1)  # Its own again.


def test_a_version_in_use_is_kept_until_the_flip(arena_path, layout, model, tiny):
    with WeightArena.create(arena_path, layout, slots=2) as arena:
        arena.publish(model.named_parameters(), version=0)
        binding = bind(hf.LlamaForCausalLM(tiny), arena.acquire())
        arena.publish(model.named_parameters(), version=1)
        with pytest.raises(TimeoutError, match=rf"\(version 0\) by pid {os.getpid()}"):
            arena.publish(model.named_parameters(), version=2, deadline_s=0)
        binding.follow()
        arena.publish(model.named_parameters(), version=2, deadline_s=0)


def test_an_older_or_other_version_is_refused(arena, arena_path, model, tiny):
    old = arena.acquire()
    arena.publish(model.named_parameters(), version=1)
    engine_model = hf.LlamaForCausalLM(tiny)
    binding = bind(engine_model, arena.acquire())
    with pytest.raises(ValueError, match="Cannot go back from version 1 to 0"):
        binding.flip(old)
    assert not old.held
    other = Layout.from_config(tiny, dtype="bfloat16")
    with WeightArena.create(arena_path.with_name("other"), other) as halves:
        halves.publish(model.named_parameters(), version=2)
        with pytest.raises(ValueError, match=r"has another layout: .*bind the model again"):
            binding.flip(halves.acquire())
    assert binding.version == 1 and binding.lease.held
    assert all(inside(binding.lease, parameter) for parameter in engine_model.parameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            dict(num_hidden_layers=1),
            r"only the model has nothing, and only the arena has \['model\.layers\.1",
        ),
        (dict(num_hidden_layers=3), r"only the model has \['model\.layers\.2"),
        (dict(vocab_size=65), r"model\.embed_tokens\.weight: the model has \[65, 32\]"),
        (
            dict(attention_bias=True),
            r"only the model has \['model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
    ],
)
def test_a_model_of_another_shape_is_untouched(arena, tiny, change, complaint):
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny.to_dict(), **change}))
    before = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    with arena.acquire() as lease:
        with pytest.raises(ValueError, match=complaint):
            bind(other, lease)
        assert lease.held
    assert before == {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_other_dtypes_ties_and_shards_are_refused(arena, arena_path, tiny, model):
    with pytest.raises(ValueError, match=r"torch\.bfloat16, the arena .*torch\.float32"):
        bind(hf.LlamaForCausalLM(tiny).bfloat16(), arena.acquire())
    untied = hf.LlamaConfig(**{**tiny.to_dict(), "tie_word_embeddings": False})
    layout = Layout.from_config(untied, dtype="float32")
    with WeightArena.create(arena_path.with_name("untied"), layout) as other:
        other.publish(hf.LlamaForCausalLM(untied).named_parameters(), version=0)
        with pytest.raises(ValueError, match=r"only the arena has \['lm_head\.weight'\]"):
            bind(hf.LlamaForCausalLM(tiny), other.acquire())
    shard = Layout.from_config(tiny, dtype="float32", tp_size=2)
    with WeightArena.create(arena_path.with_name("shard"), shard) as other:
        other.publish(model.named_parameters(), version=0)
        with pytest.raises(ValueError, match="on rank 0 of 2"):
            bind(hf.LlamaForCausalLM(tiny), other.acquire())


# ---- another process

CHILD = """
import json, sys
from itertools import chain
import numpy as np, torch, transformers as hf
from kimi_core.rollout.engine import Request, Sampling
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import bind
torch.set_num_threads(1)
path, config, vocab = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()  # Its weights are random.
binding = bind(model, WeightArena.open(path).acquire())
engine = TorchEngine(model, batch_rows=2, policy_version=binding.version)
for _ in sys.stdin:
    engine.policy_version = binding.follow()
    prompts = [np.arange(3, 9, dtype=np.int32), np.arange(20, 24, dtype=np.int32)]
    requests = [Request(i, ids, len(ids), 8, 8) for i, ids in enumerate(prompts)]
    sampling = Sampling(temperature=0, seed=0, stop_token_ids=frozenset())
    for part in chain.from_iterable(engine.generate(requests, sampling)):
        ids = [*map(int, prompts[part.trajectory_id]), *map(int, part.token_ids)]
        row = [part.policy_version, ids, len(part), [float(x) for x in part.logprobs]]
        print(json.dumps(row), flush=True)
"""


def own_logprobs(model: hf.PreTrainedModel, ids: list[int], new: int) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)[-new - 1 : -1]
    return logprobs.gather(1, torch.tensor(ids[-new:])[:, None])[:, 0].numpy()


def follow_in_another_process(
    model: hf.PreTrainedModel, arena: WeightArena, versions: int
) -> float:
    """Largest |Δ log-prob| between the trainer and an engine elsewhere, after each update."""
    worst = 0.0
    vocab = model.config.vocab_size
    arguments = [arena.path, json.dumps(model.config.to_dict()), str(vocab)]
    child = Warm(["-c", CHILD, *arguments])
    before: list[float] = []
    for version in range(1, versions + 1):
        train(model)
        arena.publish(model.named_parameters(), version=version)
        child.stdin.write("\n")
        child.stdin.flush()
        now = []
        for _ in range(2):
            policy_version, ids, new, logprobs = json.loads(child.stdout.readline())
            assert policy_version == version and new == 8
            delta = np.abs(own_logprobs(model.eval(), ids, new) - logprobs)
            worst = max(worst, float(delta.max()))
            now += logprobs
        assert not before or np.abs(np.subtract(before, now)).max() > 1e-3  # It did move.
        before = now
    child.stdin.close()
    assert child.wait(timeout=60) == 0
    return worst


def test_an_engine_in_another_process_follows(arena, model):
    worst = follow_in_another_process(model, arena, versions=5)
    print(f"largest |Δ log-prob| {worst:.2e}")
    assert worst <= 1e-4


@pytest.mark.nightly
def test_smollm2_in_another_process_follows(smollm2, arena_path):
    model, _ = load_pretrained(str(smollm2), dtype="float32", device="cpu")
    layout = Layout.from_config(model.config, dtype="float32")
    with WeightArena.create(arena_path, layout, slots=2) as arena:
        arena.publish(model.named_parameters(), version=0)
        worst = follow_in_another_process(model, arena, versions=2)
    print(f"SmolLM2: largest |Δ log-prob| {worst:.2e}")
    assert worst <= 1e-4


def test_the_embedded_engine_on_views_is_the_engine_on_the_model(arena, tiny, model):
    ids = np.arange(2, 9, dtype=np.int32)
    other = hf.LlamaForCausalLM(tiny)
    bind(other, arena.acquire())
    found = []
    for one in (model, other):
        engine = TorchEngine(one.eval(), batch_rows=1)
        found += chain.from_iterable(engine.generate([Request(0, ids, 7, 9, 9)], GREEDY))
    assert found[0].token_ids.tolist() == found[1].token_ids.tolist()
    np.testing.assert_array_equal(found[0].logprobs, found[1].logprobs)
