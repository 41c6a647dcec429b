"""The plan of a slot beside transformers' own models: ranks give the whole, each holds its own."""

import math

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.weights.layout import ALIGNMENT, Layout

FAMILIES = {
    "llama": hf.LlamaConfig,
    "mistral": hf.MistralConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
}
SHARDED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
SHARDED += ("o_proj.weight", "down_proj.weight")  # Their biases are added once, by any rank.
SHAPES = dict(
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    bias=st.booleans(),
    vocab=st.sampled_from([64, 128, 192, 200]),
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 6]),
    tp_size=st.sampled_from([1, 2, 4]),
)


def config_of(family, *, tied, bias, vocab, layers, kv_heads, head_dim) -> hf.PretrainedConfig:
    biases = {"attention_bias": bias, "mlp_bias": bias} if family == "llama" else {}
    return FAMILIES[family](
        vocab_size=vocab,
        hidden_size=20,  # No multiple of the heads' width.
        intermediate_size=28,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **biases,
    )


@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_ranks_together_hold_every_parameter_and_each_only_its_rows(tp_size, **shape):
    config = config_of(**shape)
    model = hf.AutoModelForCausalLM.from_config(config)
    layouts = [
        Layout.from_config(config, dtype="float32", tp_rank=rank, tp_size=tp_size)
        for rank in range(tp_size)
    ]
    own = dict(model.named_parameters())
    times = {name: torch.zeros_like(parameter, dtype=torch.int) for name, parameter in own.items()}
    for layout in layouts:
        names = [part.name for entry in layout.entries for part in entry.parts]
        assert sorted(names) == sorted(own)  # Each once.
        for entry in layout.entries:
            row = 0
            for part in entry.parts:
                assert part.whole == tuple(own[part.name].shape)
                assert part.row == row and part.shape[1:] == entry.shape[1:]
                row += part.shape[0]
                times[part.name][part.index] += 1
            assert row == entry.shape[0]
    kv_repeats = max(1, tp_size // shape["kv_heads"])
    for name, count in times.items():
        sharded = any(end in name for end in SHARDED)
        repeats = kv_repeats if ".k_proj" in name or ".v_proj" in name else 1
        assert (count == (repeats if sharded else tp_size)).all(), name


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_entries_are_aligned_and_apart(tp_size, **shape):
    layout = Layout.from_config(config_of(**shape), dtype="bfloat16", tp_size=tp_size)
    end = 0
    for entry in layout.entries:
        assert entry.offset % ALIGNMENT == 0 and entry.offset >= end
        assert entry.nbytes == 2 * math.prod(entry.shape)
        end = entry.offset + entry.nbytes
    assert end <= layout.payload_bytes < end + 2 * ALIGNMENT
    again = Layout.from_json(layout.to_json())
    assert again == layout and again.hash == layout.hash


def names_of(layout: Layout) -> list[str]:
    return [entry.name.removeprefix("model.layers.0.") for entry in layout.entries]


def test_names_are_those_of_vllm():
    config = config_of("qwen3", tied=False, bias=False, vocab=64, layers=1, kv_heads=2, head_dim=4)
    assert names_of(Layout.from_config(config, dtype="float32")) == [
        "model.embed_tokens.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_biases_are_where_the_family_has_them():
    config = config_of("qwen2", tied=True, bias=False, vocab=64, layers=1, kv_heads=2, head_dim=4)
    layout = Layout.from_config(config, dtype="float32", tp_rank=1, tp_size=2)
    biases = [entry for entry in layout.entries if entry.name.endswith("bias")]
    assert [entry.name for entry in biases] == ["model.layers.0.self_attn.qkv_proj.bias"]
    assert [(p.name[-11:], p.start, p.stop) for p in biases[0].parts] == [
        ("q_proj.bias", 8, 16),
        ("k_proj.bias", 4, 8),
        ("v_proj.bias", 4, 8),
    ]


def test_kv_heads_are_repeated_where_ranks_are_more():
    config = config_of("llama", tied=True, bias=False, vocab=64, layers=1, kv_heads=2, head_dim=4)
    held = []
    for rank in range(4):
        layout = Layout.from_config(config, dtype="float32", tp_rank=rank, tp_size=4)
        part = layout.by_hf_name["model.layers.0.self_attn.k_proj.weight"][1]
        held.append((part.start, part.stop))
    assert held == [(0, 4), (0, 4), (4, 8), (4, 8)]


def test_the_vocabulary_is_cut_after_rounding_up_to_64():
    config = config_of("llama", tied=True, bias=False, vocab=200, layers=1, kv_heads=2, head_dim=4)
    rows = [
        Layout.from_config(config, dtype="float32", tp_rank=rank, tp_size=4).entries[0].shape[0]
        for rank in range(4)
    ]
    assert rows == [64, 64, 64, 8]
    config.num_attention_heads = config.intermediate_size = config.num_key_value_heads = 12
    with pytest.raises(ValueError, match=r"does not divide vocab_size, rounded up .* = 256"):
        Layout.from_config(config, dtype="float32", tp_size=3)


def test_tied_embeddings_are_stored_once(layout):
    assert layout.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in [entry.name for entry in layout.entries]
    assert layout.by_hf_name["lm_head.weight"] == layout.by_hf_name["model.embed_tokens.weight"]


def test_an_unknown_model_keeps_its_names_and_says_so():
    config = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    with pytest.warns(UserWarning, match="'gpt2' is not one of llama, mistral, qwen2, qwen3"):
        layout = Layout.from_config(config, dtype="float32", tp_rank=1, tp_size=2)
    own = {n: tuple(p.shape) for n, p in hf.GPT2LMHeadModel(config).named_parameters()}
    assert {entry.name: entry.shape for entry in layout.entries} == own
    assert "has to copy" in layout.note
    assert Layout.from_json(layout.to_json()) == layout


def test_every_change_changes_the_hash(tiny, layout):
    others = [
        Layout.from_config(tiny, dtype="bfloat16"),
        Layout.from_config(tiny, dtype="float32", tp_size=2),
        Layout.from_config(tiny, dtype="float32", tp_rank=1, tp_size=2),
        Layout.from_config(
            hf.LlamaConfig(**{**tiny.to_dict(), "num_hidden_layers": 1}), dtype="float32"
        ),
        Layout.from_config(
            hf.LlamaConfig(**{**tiny.to_dict(), "tie_word_embeddings": False}), dtype="float32"
        ),
    ]
    hashes = {other.hash for other in others} | {layout.hash}
    assert len(hashes) == len(others) + 1
    assert all(layout.difference(other) for other in others)
    assert Layout.from_config(tiny, dtype=torch.float32).hash == layout.hash
    assert layout.difference(layout) == ""


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (dict(dtype="float64"), "allowed are float32, bfloat16, float16"),
        (dict(dtype="float32", tp_rank=2, tp_size=2), "0 to 1 are allowed"),
        (dict(dtype="float32", tp_size=3), "does not divide num_attention_heads = 4"),
        (dict(dtype="float32", tp_size=8), "does not divide num_attention_heads = 4"),
    ],
)
def test_what_no_rank_can_hold_is_refused(tiny, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        Layout.from_config(tiny, **given)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"entries": [{}], "tied": {}}', '{"entries": 3}']
)
def test_text_that_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match="Cannot read the arena's table of tensors"):
        Layout.from_json(text)
