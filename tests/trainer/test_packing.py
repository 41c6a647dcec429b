"""Micro-batches hold every wanted token once, and packing changes no log-prob."""

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch

VOCAB = 40
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
LLAMA_LIKE = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA_LIKE),
    # Learned positions: only the restart of the position ids tells where a sequence begins.
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    # A window shorter than the sequences: it must not reach into the neighbour either.
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE, sliding_window=5),
}


def pack(sequences) -> Batch:
    """A batch of (token ids, wanted) pairs; ``mask`` is what is wanted."""
    lengths = [len(ids) for ids, _ in sequences]
    total = sum(lengths)
    return Batch(
        token_ids=np.concatenate([ids for ids, _ in sequences]).astype(np.int32),
        logprobs=np.zeros(total, np.float32),
        mask=np.concatenate([wanted for _, wanted in sequences]).astype(np.uint8),
        policy_versions=np.zeros(total, np.int32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
    )


def random_batch(lengths, *, seed=0) -> Batch:
    """Every sequence wants its second half and, if that has a neighbour, one token before it."""
    rng = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        wanted = np.arange(length) >= max(1, length // 2)
        wanted[1 : length // 2 : 3] = True  # with gaps, as excluded segments leave them
        sequences.append((rng.integers(VOCAB, size=length), wanted))
    return pack(sequences)


@st.composite
def batches(draw):
    sequences = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)):
        wanted = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        wanted[0] = False  # nothing before it predicts it
        sequences.append((np.zeros(length), np.array(wanted)))
    batch = pack(sequences)
    batch.token_ids[:] = np.arange(1, len(batch.token_ids) + 1)  # each id says where it came from
    chosen = draw(st.permutations(range(len(batch))))
    return batch, chosen[: draw(st.integers(0, len(batch)))]


@pytest.mark.parametrize("layout", ["rows", "alone", "end_to_end"])
@given(drawn=batches(), max_tokens=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_every_wanted_token_stands_once_in_its_place(layout, drawn, max_tokens):
    batch, chosen = drawn
    wanted = batch.mask > 0
    sources = []
    for micro in micro_batches(batch, wanted, chosen, max_tokens=max_tokens, layout=layout):
        rows, columns = micro.ids_rl.shape
        ids, positions = micro.ids_rl.numpy(), micro.positions_rl.numpy()
        assert rows * columns <= max_tokens or rows == 1
        present = np.sort(ids[ids > 0]) - 1  # indices into the packed batch
        owners = np.searchsorted(batch.cu_seqlens, present, side="right") - 1
        if rows * columns > max_tokens:
            assert set(owners) == {owners[0]}  # one that is too long, and alone
        # Sequences up to their last wanted token, each in one piece with positions from 0.
        for index in np.unique(owners):
            start, end = batch.cu_seqlens[index : index + 2]
            end = start + np.flatnonzero(wanted[start:end])[-1]
            assert (owners == index).sum() == end - start
            row, column = np.argwhere(ids == start + 1)[0]
            piece = slice(column, column + end - start)
            assert ids[row, piece].tolist() == batch.token_ids[start:end].tolist()
            assert positions[row, piece].tolist() == list(range(end - start))
        assert layout != "end_to_end" or (rows == 1 and (ids > 0).all())
        # Padding belongs to no sequence: its positions start again at 0, unless it has no mask.
        for row in range(rows):
            padding = np.flatnonzero(ids[row] == 0)
            first = columns - len(padding) if layout == "alone" else 0
            assert positions[row, padding].tolist() == list(range(first, first + len(padding)))
        row_t, column_t, source_t, sequence_t = (
            index.numpy()
            for index in (micro.row_t, micro.column_t, micro.source_t, micro.sequence_t)
        )
        assert micro.ids_t.tolist() == batch.token_ids[source_t].tolist()
        assert ids[row_t, column_t].tolist() == batch.token_ids[source_t - 1].tolist()
        starts = batch.cu_seqlens[sequence_t]
        assert positions[row_t, column_t].tolist() == (source_t - 1 - starts).tolist()
        assert (source_t < batch.cu_seqlens[sequence_t + 1]).all()
        sources.extend(source_t.tolist())
    expected = [
        token
        for index in chosen
        for token in range(*batch.cu_seqlens[index : index + 2])
        if wanted[token]
    ]
    assert sorted(sources) == sorted(expected)


def test_sequences_that_want_nothing_are_left_out():
    batch = pack([(np.arange(4), [0, 0, 1, 1]), (np.arange(9), [0] * 9), (np.arange(3), [0, 0, 1])])
    (micro,) = micro_batches(batch, batch.mask > 0, range(3), max_tokens=100, layout="rows")
    assert micro.ids_rl.shape == (2, 3)
    assert sorted(set(micro.sequence_t.tolist())) == [0, 2]


def test_nothing_wanted_gives_no_micro_batch():
    batch = pack([(np.arange(4), [0, 0, 0, 0])])
    assert list(micro_batches(batch, batch.mask > 0, [0], max_tokens=100, layout="rows")) == []
    assert list(micro_batches(batch, batch.mask == 0, [], max_tokens=100, layout="rows")) == []


@pytest.mark.parametrize(("lengths", "rows"), [([9, 9, 5, 5], 3), ([9, 7, 7, 6], 1)])
def test_short_sequences_lie_in_rows_if_little_is_padding(lengths, rows):
    batch = random_batch(lengths)  # without each one's last token 24 tokens, or 25
    (micro,) = micro_batches(
        batch, batch.mask > 0, range(4), max_tokens=99, layout="end_to_end", masks_up_to=8
    )
    assert micro.ids_rl.shape == ((3, 8) if rows == 3 else (1, 25))
    assert (micro.packing is None) == (rows == 3)


@pytest.mark.parametrize("layout", ["rows", "alone", "end_to_end"])
def test_what_follows_the_last_wanted_token_is_not_computed(layout):
    batch = pack([(np.arange(1, 9), [0, 0, 0, 1, 0, 1, 0, 0]), (np.arange(11, 13), [0, 1])])
    (micro,) = micro_batches(batch, batch.mask > 0, [0, 1], max_tokens=100, layout=layout)
    assert sorted(micro.ids_rl[micro.ids_rl > 0].tolist()) == [1, 2, 3, 4, 5, 11]
    assert sorted(micro.ids_t.tolist()) == [4, 6, 12]


def test_a_shared_prompt_suffices_for_responses_of_one_token():
    batch = pack([(np.array([1, 2, 3, last]), [0, 0, 0, 1]) for last in (4, 5, 6)])
    (micro,) = micro_batches(
        batch, batch.mask > 0, range(3), max_tokens=9, layout="end_to_end", share_prompts=True
    )
    assert micro.ids_rl.tolist() == [[1, 2, 3]]
    assert micro.column_t.tolist() == [2, 2, 2] and micro.ids_t.tolist() == [4, 5, 6]


def test_short_sequences_fill_the_rows_of_long_ones():
    batch = random_batch([10, 6, 4, 7, 3])
    (micro,) = micro_batches(batch, batch.mask > 0, range(5), max_tokens=30, layout="rows")
    assert micro.ids_rl.shape == (3, 9)  # 9, 6 + 3 and 5 + 2, without each one's last token


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    # Large enough weights that a token from the wrong sequence would be seen.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.mark.parametrize("max_tokens", [16, 64, 4096])
@torch.no_grad()
def test_packing_changes_no_logprob(model, max_tokens):
    batch = random_batch([13, 2, 9, 30, 5, 5, 17, 3, 8])
    packed = np.full(len(batch.token_ids), np.nan, np.float32)
    for micro in micro_batches(
        batch, batch.mask > 0, range(len(batch)), max_tokens=max_tokens, layout="rows"
    ):
        logits = model(
            input_ids=micro.ids_rl, position_ids=micro.positions_rl, use_cache=False
        ).logits
        logprobs = logits[micro.row_t, micro.column_t].log_softmax(-1)
        packed[micro.source_t] = logprobs.gather(1, micro.ids_t[:, None])[:, 0]
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(batch.token_ids[start:end]).long()
        alone = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        alone = alone.gather(1, ids[1:, None])[:, 0].numpy()
        wanted = batch.mask[start + 1 : end] > 0
        np.testing.assert_allclose(
            packed[start + 1 : end][wanted], alone[wanted], rtol=0, atol=1e-5
        )
    assert np.isnan(packed).tolist() == (batch.mask == 0).tolist()


def siblings(prompts, responses, *, seed=0) -> Batch:
    """``responses[i]`` lists the lengths of the responses to a prompt of ``prompts[i]`` tokens."""
    rng = np.random.default_rng(seed)
    sequences = []
    for prompt, lengths in zip(prompts, responses, strict=True):
        prompt_ids = rng.integers(VOCAB, size=prompt)
        for length in lengths:
            ids = np.concatenate([prompt_ids, rng.integers(VOCAB, size=length)])
            sequences.append((ids, np.arange(prompt + length) >= prompt))
    return pack(sequences)


@pytest.mark.parametrize("layout", ["rows", "end_to_end"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_shared_prompt_changes_no_logprob(name, layout):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    # Two prompts that gain by sharing, one whose responses are too long to, and a single one.
    batch = siblings([9, 12, 2, 20], [[2, 3, 1], [1, 1, 4, 2], [9, 8], [3]])
    policy = Policy(model, temperature=1.0, head_chunk=64)
    results, tokens = [], []
    for share in (False, True):
        found = np.full(len(batch.token_ids), np.nan)
        used = 0
        for micro in micro_batches(
            batch,
            batch.mask > 0,
            range(len(batch)),
            max_tokens=60,
            layout=layout,
            share_prompts=share,
        ):
            used += micro.ids_rl.numel()
            found[micro.source_t.numpy()] = policy.logprobs(micro).detach().numpy()
            assert micro.ids_t.tolist() == batch.token_ids[micro.source_t.numpy()].tolist()
        assert not np.isnan(found[batch.mask > 0]).any()
        results.append(found[batch.mask > 0])
        tokens.append(used)
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    assert tokens[1] < 0.7 * tokens[0]
