"""What a pass keeps is counted, and what it recomputes fits the budget."""

import copy
import logging

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from kimi_core.models.placement import freeze_below
from kimi_core.trainer import activations
from kimi_core.trainer.activations import Footprint, Plan, Recompute, measure, trained_layers

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": hf.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "qwen3": hf.Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16),
    "gpt2": hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=600),
}


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def hidden(model, ids):
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def saved_bytes(model, tokens: int) -> int:
    """Bytes that autograd saves in a pass, counted without ``measure``."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden(model, torch.ones(1, tokens, dtype=torch.int64))
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters)


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_longer_pass_keeps_what_the_footprint_says(name, layers):
    model = build(name)
    if layers and name != "gpt2":
        freeze_below(model, layers)
    footprint = measure(model, lambda ids: hidden(model, ids))
    kept = footprint.rest + footprint.layers * footprint.layer
    assert footprint.layers == len(trained_layers(model))
    assert 512 * kept == pytest.approx(saved_bytes(model, 512), rel=0.05)
    assert 0 < footprint.mlp < footprint.layer
    assert footprint.stream == 4 * 32  # float32 [tokens, hidden]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_changes_no_gradient_and_keeps_what_the_plan_says(name, chunk, monkeypatch):
    ids = torch.randint(50, (1, 64), generator=torch.Generator().manual_seed(1))
    slopes, kept = [], []
    for memory_gb in (None, 1e-9):
        model = build(name)
        recompute = Recompute(model, memory_gb)
        footprint = recompute.footprint(lambda ids, model=model: hidden(model, ids))
        if chunk:
            monkeypatch.setattr(activations, "CHUNK", chunk)
        plan = recompute.fit(64)
        assert plan == Plan(3 if memory_gb else 0, bool(memory_gb and chunk))
        kept.append(saved_bytes(model, 64))
        hidden(model, ids).square().sum().backward()
        slopes.append([p.grad for p in model.parameters() if p.grad is not None])
    # Of each layer its input; the hidden states, the positions and the like are in `rest`.
    assert kept[1] == pytest.approx(64 * (footprint.rest + 3 * footprint.stream), rel=0.25)
    assert kept[1] < kept[0] / 2
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


class Shifted(torch.nn.Module):
    """An MLP that mixes neighbouring tokens."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, hidden_rld):
        return self.plain(hidden_rld.roll(1, 1))


def test_an_mlp_that_mixes_tokens_is_not_cut():
    model = build("llama")
    model.model.layers[-1].mlp = Shifted(model.model.layers[-1].mlp)
    footprint = measure(model, lambda ids: hidden(model, ids * torch.arange(32)))
    assert footprint.mlp == 0.0
    assert footprint.least(10**6) == Plan(3, False)


def test_without_gradients_nothing_is_computed_twice():
    model = build("llama")
    recompute = Recompute(model, 1e-9)
    recompute.footprint(lambda ids: hidden(model, ids))
    recompute.fit(64)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.ones(1, 64, dtype=torch.int64)
    with torch.no_grad():
        hidden(model, ids)
    assert len(calls) == 1
    hidden(model, ids).sum().backward()
    assert len(calls) == 3


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = build("llama")
    recompute = Recompute(model, 1e-9)
    recompute.footprint(lambda ids: hidden(model, ids))
    recompute.fit(64)
    other = copy.deepcopy(model)
    ids = torch.ones(1, 8, dtype=torch.int64)
    before = hidden(other, ids).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(hidden(other, ids).detach(), before, rtol=0, atol=0)


footprints = st.builds(
    Footprint,
    layers=st.integers(0, 40),
    layer=st.floats(100, 1e6),
    mlp=st.sampled_from([0.0, 60.0]),
    stream=st.floats(1, 50),
    rest=st.floats(1, 1e5),
)


@given(footprints, st.integers(1, 200_000), st.floats(0, 1e12))
def test_the_plan_recomputes_no_more_than_it_must(footprint, tokens, budget):
    plan = footprint.plan(tokens, int(budget))
    if plan is None:
        assert footprint.bytes(tokens, footprint.least(tokens)) > budget
        return
    assert footprint.bytes(tokens, plan) <= budget
    if plan.layers:
        assert footprint.bytes(tokens, Plan(plan.layers - 1, False)) > budget
    if plan.chunked:
        assert footprint.bytes(tokens, Plan(footprint.layers, False)) > budget


@given(footprints, st.integers(0, 10**12))
def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(footprint, budget):
    most = footprint.most_tokens(budget)
    if most:
        assert footprint.plan(most, budget) is not None
    assert footprint.plan(most + 1, budget) is None


def test_what_fits_nowhere_is_said_once(caplog):
    model = build("llama")
    recompute = Recompute(model, 1e-9)
    recompute.footprint(lambda ids: hidden(model, ids))
    with caplog.at_level(logging.WARNING):
        assert recompute.fit(64) == Plan(3, False)
        recompute.fit(65)
    assert len(caplog.records) == 1
    assert "64 tokens" in caplog.text and "trainer.memory_gb" in caplog.text


def test_the_memory_of_this_machine_is_known():
    assert 1e9 < activations.device_memory(torch.device("cpu")) < 1e14


def test_micro_batches_get_smaller_only_if_they_must():
    model = build("llama")

    def run(ids):
        hidden(model, ids)

    assert Recompute(model, 1.0).most_tokens(100, run) == 100
    footprint = measure(model, run)
    tight = Recompute(model, footprint.bytes(40, footprint.least(40)) / 1e9)
    assert 35 <= tight.most_tokens(100, run) <= 41
    assert Recompute(model, 1e-9).most_tokens(100, run) == 1
