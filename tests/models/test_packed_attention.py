"""Attention without a mask of the row, beside plain attention with one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_core.models.packed_attention import (
    BRIEF,
    NAME,
    SLACK,
    Packing,
    Piece,
    attend,
    use_packed_attention,
)
from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch

HEADS, KV_HEADS, DIM = 4, 2, 8


def with_a_mask(query, key, value, pieces, window, scale):
    """The slow twin: every column's keys, one piece at a time, from a mask of the whole row."""
    columns = query.shape[2]
    seen = torch.zeros(columns, columns, dtype=torch.bool)
    for piece in pieces:
        own = torch.cat([torch.arange(*span) for span in piece.spans])
        for place, column in enumerate(own[piece.skip :], piece.skip):
            first = 0 if window is None else max(0, place - window + 1)
            seen[column, own[first : place + 1]] = True
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2)


@st.composite
def rows(draw):
    """Pieces that fill a row in order: single sequences, and siblings after their prompt."""
    pieces, column = [], 0
    for _ in range(draw(st.integers(1, 5))):
        prompt = draw(st.integers(0, 9))
        trunk = (column, column + prompt)
        column += prompt
        for sibling in range(draw(st.integers(1, 3)) if prompt else 1):
            end = column + draw(st.integers(1, 12))
            if sibling == 0:
                pieces.append(Piece(((trunk[0], end),)))
            else:
                pieces.append(Piece((trunk, (column, end)), skip=prompt))
            column = end
    return pieces, column


@given(rows(), st.sampled_from([None, 1, 3, 7]), st.sampled_from([None, 0.3]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_outputs_and_gradients_are_those_of_the_mask(row, window, scale, apart):
    pieces, columns = row
    generator = torch.Generator().manual_seed(columns)
    q, k, v = (
        torch.randn(1, heads, columns, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    packing = Packing.of(pieces)
    if apart:  # Every sequence by itself.
        alone = [group for one in pieces for group in Packing.of([one]).groups]
        packing = Packing(tuple(alone), None)
    outputs = []
    for compute in (
        lambda *x: attend(
            torch.nn.Identity(), *x, None, packing, scaling=scale, sliding_window=window
        )[0],
        lambda *x: with_a_mask(*x, pieces, window, scale or DIM**-0.5),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = compute(*inputs)
        assert out.shape == (1, columns, HEADS, DIM)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        outputs.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
@settings(deadline=None)
def test_groups_are_padded_little(lengths):
    edges = np.cumsum([0, *sorted(lengths, reverse=True)]).tolist()
    packing = Packing.of([Piece((span,)) for span in pairwise(edges)])
    for group in packing.groups:
        n, longest = group.columns_nl.shape
        used = n * longest if group.outputs_t is None else len(group.outputs_t)
        assert n * longest <= max(SLACK * used, n * BRIEF)
        assert (group.start is None) == (used < n * longest)


def test_siblings_of_all_lengths_are_few_calls():
    rng, pieces, column = np.random.default_rng(0), [], 0
    for _ in range(8):
        trunk, column = (column, column + 60), column + 60
        for sibling in range(8):
            own = (column, column := column + int(rng.integers(1, 200)))
            pieces.append(Piece((trunk, own), skip=60 if sibling else 0))
    assert len(pieces) == 64 and len(Packing.of(pieces).groups) <= 6


def tiny(kind: str, **settings) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = {
        "llama": hf.LlamaConfig,
        "mistral": hf.MistralConfig,
        "gemma3": hf.Gemma3TextConfig,
    }[kind](
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1 << 15,
        **settings,
    )
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def batch_of(lengths: list[int]) -> Batch:
    tokens = np.random.default_rng(0).integers(3, 40, sum(lengths)).astype(np.int32)
    edges = np.cumsum([0, *lengths]).astype(np.int32)
    mask = np.ones(len(tokens), np.uint8)
    mask[edges[:-1]] = 0
    blank = np.zeros(len(tokens), np.float32)
    return Batch(tokens, blank, mask, blank.astype(np.int32), edges)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.untyped_storage().size() // one.element_size())
        return out


@pytest.mark.parametrize(
    "model",
    [
        tiny("llama"),
        tiny("mistral", sliding_window=64),
        tiny("gemma3", sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=lambda model: model.config.model_type,
)
def test_no_tensor_grows_with_the_square_of_the_row(model):
    policy = Policy(model, temperature=1.0, head_chunk=64)
    assert policy.layout == "end_to_end" and policy.shares_prompts
    batch = batch_of([1200, 700, 100])
    (micro,) = micro_batches(batch, batch.mask > 0, range(3), max_tokens=2000, layout=policy.layout)
    assert micro.ids_rl.shape == (1, 1997)  # Nothing is padding.
    with Largest() as largest:
        policy.logprobs(micro).sum().backward()
    assert largest.numel < 2000 * 64


def test_a_plain_call_is_as_before():
    model = tiny("llama")
    ids = torch.arange(3, 23).view(2, 10)
    padded = torch.ones(2, 10, dtype=torch.int64)
    padded[1, 7:] = 0
    before = model(input_ids=ids, attention_mask=padded).logits
    assert use_packed_attention(model) and use_packed_attention(model)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(model(input_ids=ids, attention_mask=padded).logits, before)
    assert "attn" not in str(model.config.to_dict())  # A checkpoint and a fingerprint stay as is.


def test_eager_attention_keeps_its_masks(caplog):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model)
    policy = Policy(model, temperature=1.0, head_chunk=64)
    assert policy.layout == "rows"
    assert "LlamaForCausalLM" in caplog.text and "l × l" in caplog.text


@pytest.mark.parametrize("added", [{"softcap": 3.0}, {"position_bias": torch.zeros(1)}])
def test_what_sdpa_cannot_add_is_an_error(added):
    packing = Packing.of([Piece(((0, 3),))])
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match=next(iter(added))):
        attend(torch.nn.Identity(), q, q, q, None, packing, **added)


@pytest.mark.parametrize(
    ("kind", "settings", "up_to"),
    [("llama", {}, 512), ("mistral", {"sliding_window": 64}, 0)],
)
def test_short_sequences_keep_their_masks_on_a_cpu(kind, settings, up_to):
    policy = Policy(tiny(kind, **settings), temperature=1.0, head_chunk=64)
    assert (policy.layout, policy.masks_up_to) == ("end_to_end", up_to)
    for longest in (513, 514):
        batch = batch_of([longest] * 3)
        (micro,) = micro_batches(
            batch,
            batch.mask > 0,
            range(3),
            max_tokens=2000,
            layout=policy.layout,
            masks_up_to=policy.masks_up_to,
        )
        assert (micro.packing is None) == (longest - 1 <= up_to)
