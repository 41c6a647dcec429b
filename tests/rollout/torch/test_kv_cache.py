"""The cache beside a list of lists: rows enter, decode and leave, and each sees its own past."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import _C
from kimi_core.rollout.torch import kv_cache
from kimi_core.rollout.torch.attention import Part, one_token
from kimi_core.rollout.torch.kv_cache import WORTH_A_COHORT, KVCache

LAYERS, HEADS, DIM = 2, 2, 3
LONGEST = 40


def new_cache(position_bytes: int, *, split: bool = True, dtype=torch.float32) -> KVCache:
    """In float32 the core attends, by lengths; in float64 torch does, by masks."""
    return KVCache(LAYERS, torch.empty(0, dtype=dtype), position_bytes, split=split)


class Checked:
    """A cache, and the keys that each row of the batch must see; values are their negative."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.rows: list[torch.Tensor] = []  # [layers, length, heads, dim] each
        self.stamp = 0.0

    def enter(self, lengths: list[int], samples: int, chunk: int = LONGEST) -> None:
        """Prefill contexts of ``lengths``, longest first, each for some rows; one alone in chunks
        of ``chunk`` tokens."""
        contexts = [self._fresh(length) for length in sorted(lengths, reverse=True)]
        row_lengths = np.array([c.shape[1] for c in contexts for _ in range(samples)])
        start = 0
        for part in self.cache.cut(row_lengths):
            assert part.start == start
            start = part.stop
            self.cache.add(row_lengths[part], LONGEST)
            rows = [contexts[row // samples] for row in range(part.start, part.stop)]
            distinct = [rows[i] for i in range(0, len(rows), samples)]
            longest = rows[0].shape[1]
            padded = torch.full((LAYERS, len(distinct), longest, HEADS, DIM), 77.0)
            for index, context in enumerate(distinct):
                padded[:, index, : context.shape[1]] = context
            contexts_m = torch.arange(len(distinct)).repeat_interleave(samples)
            step = chunk if len(distinct) == 1 else longest
            for begin in range(0, longest, step):
                end = min(begin + step, longest)
                self.cache.begin_prefill(
                    slice(0, len(rows)), begin, end, contexts_m if samples > 1 else None
                )
                for layer, keys in enumerate(padded.transpose(2, 3)):
                    assert self.cache.get_seq_length() == begin
                    new = keys[:, :, begin:end]
                    for seen, sign in zip(
                        self.cache.update(new, -new, layer), (1, -1), strict=True
                    ):
                        assert torch.equal(seen, sign * keys[:, :, :end])
        assert start == len(row_lengths)
        self.rows += [contexts[row // samples] for row in range(len(row_lengths))]

    def decode(self) -> None:
        """One token a row; every row must see exactly its own tokens, at attention weight 1."""
        lengths = np.array([row.shape[1] for row in self.rows])
        self.cache.begin_decode(lengths)
        new = [self._fresh(1) for _ in self.rows]
        self.rows = [torch.cat(pair, 1) for pair in zip(self.rows, new, strict=True)]
        keys = torch.stack(new, 1).transpose(2, 3)
        for layer in range(LAYERS):
            update = self.cache.update(keys[layer], -keys[layer], layer)
            if self.cache.split:
                parts = update[0].seen
            else:
                parts = [Part(*update, self.cache.cohorts[0].masks[None])]
            row = 0
            for seen_keys, seen_values, mask, lengths, _ in parts:
                assert (lengths is not None) == self.cache.in_core
                assert seen_keys.isfinite().all() and seen_values.isfinite().all()
                for index in range(len(seen_keys)):
                    own = self.rows[row][layer].transpose(0, 1)
                    length = own.shape[1]
                    assert torch.equal(seen_keys[index, :, :length], own)
                    assert torch.equal(seen_values[index, :, :length], -own)
                    hidden = seen_keys.shape[2] - length
                    if lengths is not None:
                        assert lengths[index] == length
                    elif hidden:
                        assert (mask[index, 0, 0, length:] < -1e30).all()
                    if mask is not None:
                        assert (mask[index, 0, 0, :length] == 0).all()
                    row += 1
            assert row == len(self.rows)

    def leave(self, ended: list[bool]) -> None:
        order = self.cache.remove(np.array(ended))
        assert sorted(order) == [row for row, end in enumerate(ended) if not end]
        self.rows = [self.rows[row] for row in order]

    def _fresh(self, length: int) -> torch.Tensor:
        self.stamp += 1
        return self.stamp + torch.rand(LAYERS, length, HEADS, DIM)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    position_bytes=st.sampled_from([0, WORTH_A_COHORT // 12, WORTH_A_COHORT]),
    split=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_row_sees_its_own_past(data, position_bytes, split, dtype):
    checked = Checked(new_cache(position_bytes, split=split, dtype=dtype))
    for _ in range(data.draw(st.integers(1, 6))):
        lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
        checked.enter(lengths, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)))
        for _ in range(data.draw(st.integers(0, 3))):
            checked.decode()
            ended = data.draw(
                st.lists(
                    st.booleans(), min_size=len(checked.rows), max_size=len(checked.rows)
                ).filter(lambda ended: not all(ended))
            )
            checked.leave(ended)


def test_rows_are_cut_where_a_call_of_their_own_pays():
    lengths = np.array([50] * 10 + [30] * 10 + [29] * 10)
    few, many = new_cache(1), new_cache(WORTH_A_COHORT // 100)
    assert few.cut(lengths) == [slice(0, 30)]
    # The tenth row of 30 makes 200 positions in vain; rows of 29 then add 1 each.
    assert many.cut(lengths) == [slice(0, 10), slice(10, 30)]
    assert new_cache(WORTH_A_COHORT // 100, split=False).cut(lengths) == [slice(0, 30)]


def test_a_cohort_that_has_become_small_joins_its_neighbour():
    checked = Checked(new_cache(WORTH_A_COHORT // 100))
    checked.enter([9], 12)
    for _ in range(20):
        checked.decode()
    checked.enter([9], 12)  # 20 shorter: 240 positions in vain if they stood together
    checked.decode()
    assert [cohort.count for cohort in checked.cache.cohorts] == [12, 12]
    checked.leave([False] * 12 + [True] * 6 + [False] * 6)
    checked.decode()  # 120 in vain
    assert [cohort.count for cohort in checked.cache.cohorts] == [12, 6]
    checked.leave([False] * 12 + [True] * 2 + [False] * 4)
    checked.decode()  # 80
    assert [cohort.count for cohort in checked.cache.cohorts] == [16]


def test_storage_grows_a_little_at_a_time_and_stops_at_the_bound():
    cache = new_cache(1)
    cache.add(np.array([62]), 90)
    assert cache.cohorts[0].positions == 68  # 63 and a 16th, in fours
    seen = {}
    for length in range(62, 90):
        cache.begin_decode(np.array([length]))
        seen[length + 1] = cache.cohorts[0].positions
    assert [seen[length] for length in (68, 69, 76)] == [68, 76, 76]
    assert seen[77] == seen[90] == 92  # all that is left is nearly nothing: at once


def test_storage_of_rows_that_left_is_given_back_at_a_growth():
    checked = Checked(new_cache(1))
    checked.enter([10], 8)
    checked.decode()
    checked.leave([False] * 2 + [True] * 6)
    (cohort,) = checked.cache.cohorts
    assert cohort.capacity == 8
    while cohort.positions < LONGEST:
        checked.decode()
    assert cohort.capacity == 2


@st.composite
def decodes(draw):
    """Sizes of a decode step, and the length of each row."""
    rows, kv_heads, group = (draw(st.integers(1, n)) for n in (4, 3, 9))
    dim = draw(st.sampled_from([2, 7, 16, 24, 64, 80, 129]))
    lengths = draw(st.lists(st.integers(1, 70), min_size=rows, max_size=rows))
    window = draw(st.none() | st.integers(1, 80))
    return kv_heads, group, dim, np.array(lengths), window


def expected_of(query, keys, values, lengths, window, scale):
    """The plain formula in float64, row by row."""
    group = query.shape[1] // keys.shape[1]
    rows = []
    for q, k, v, length in zip(query, keys, values, lengths, strict=True):
        first = max(0, length - window) if window else 0
        k, v = (x[:, first:length].double().repeat_interleave(group, 0) for x in (k, v))
        weights = (scale * q.double() @ k.transpose(1, 2)).softmax(-1)
        rows.append((weights @ v).transpose(0, 1))
    return torch.stack(rows)


def random_step(kv_heads, group, dim, lengths, spread=1.0):
    """Query, keys and values; what lies beyond a row's length is NaN, and heads lie apart."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = len(lengths), int(lengths.max())
    query = spread * torch.randn(rows, kv_heads * group, 1, dim, generator=generator)
    stored = torch.randn(2, rows + 1, kv_heads, longest + 3, dim, generator=generator)
    for row, length in enumerate(lengths):
        stored[:, row, :, length:] = torch.nan
    keys, values = stored[:, :rows, :, :longest]
    return query, keys, values


@pytest.mark.parametrize("set_", _C.instruction_sets())
@given(step=decodes(), spread=st.sampled_from([1.0, 50.0]))
def test_the_core_attends_as_the_formula_says(set_, step, spread):
    kv_heads, group, dim, lengths, window = step
    query, keys, values = random_step(kv_heads, group, dim, lengths, spread)
    got = _C.decode_attention(
        query[:, :, 0].numpy(), keys.numpy(), values.numpy(), lengths,
        scale=0.3, window=window or 0, instruction_set=set_,
    )  # fmt: skip
    expected = expected_of(query, keys, values, lengths, window, 0.3)[:, 0]
    # A score of 2,000 is rounded to 1e-4, and a weight with it.
    close = 2e-5 if spread == 1 else 2e-3
    torch.testing.assert_close(torch.from_numpy(got).double(), expected, atol=close, rtol=close)


@pytest.mark.parametrize("set_", _C.instruction_sets())
def test_long_rows_are_cut_and_merged_and_threads_change_nothing(set_):
    """Three chunks, the largest score in the first, then in the last one."""
    lengths = np.array([5000, 1, 2048, 2049])
    query, keys, values = random_step(2, 3, 16, lengths)
    keys[0, :, 10] = 3 * query[0, ::3, 0]
    keys[3, :, 2048] = 3 * query[3, ::3, 0]
    arguments = (query[:, :, 0].numpy(), keys.numpy(), values.numpy(), lengths)
    outputs = [
        _C.decode_attention(*arguments, scale=1.0, threads=threads, instruction_set=set_)
        for threads in (1, 2, 7)
    ]
    expected = expected_of(query, keys, values, lengths, None, 1.0)[:, 0]
    torch.testing.assert_close(
        torch.from_numpy(outputs[0]).double(), expected, atol=2e-5, rtol=2e-5
    )
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])
    alone = _C.decode_attention(
        *(array[3:] for array in arguments), scale=1.0, instruction_set=set_
    )
    np.testing.assert_array_equal(alone, outputs[0][3:])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float64, 1e-12)],
)
def test_attention_of_one_token(kv_heads, window, dtype, tolerance):
    lengths = np.array([11, 3, 7, 1, 11])
    query, keys, values = (
        x.nan_to_num().to(dtype) for x in random_step(kv_heads, 4 // kv_heads, 8, lengths)
    )
    if dtype == torch.float64:
        seen = torch.arange(11)
        hidden = seen >= torch.from_numpy(lengths)[:, None]
        if window:
            hidden |= seen < torch.from_numpy(lengths)[:, None] - window
        mask = torch.zeros(5, 11, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        part = Part(keys, values, mask[:, None, None])
    else:
        part = Part(keys, values, lengths=lengths, window=window)
    got = one_token(query, part, 0.3)
    assert got.dtype == dtype and got.shape == (5, 1, 4, 8)
    expected = expected_of(query, keys, values, lengths, window, 0.3)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": np.array([4, 6])}, ValueError, r"each from 1 to 5, the positions"),
        ({"lengths": np.array([0, 5])}, ValueError, r"each from 1 to 5"),
        ({"lengths": np.array([5])}, ValueError, r"lengths must be \[2\]"),
        ({"query": np.zeros((2, 3, 8), np.float32)}, ValueError, r"heads a multiple of kv_heads"),
        ({"query": np.zeros((2, 4, 7), np.float32)}, ValueError, r"query \(2, 4, 7\), keys"),
        ({"values": np.zeros((2, 2, 4, 8), np.float32)}, ValueError, r"values \(2, 2, 4, 8\)"),
        ({"keys": np.zeros((2, 2, 8, 5), np.float32).swapaxes(2, 3)}, ValueError, "keys must hold"),
        ({"values": np.zeros((2, 2, 5, 8), np.uint16)}, TypeError, "both be float32"),
        ({"window": -1}, ValueError, "window = -1"),
        ({"threads": 0}, ValueError, "threads = 0"),
        ({"instruction_set": "sse"}, ValueError, "no passes for 'sse'"),
    ],
)
def test_what_the_core_refuses(change, error, message):
    stored = np.zeros((2, 2, 5, 8), np.float32)
    given = {
        "query": np.zeros((2, 4, 8), np.float32),
        "keys": stored,
        "values": stored,
        "lengths": np.array([4, 5]),
        "scale": 1.0,
    } | change
    with pytest.raises(error, match=message):
        _C.decode_attention(**given)


def test_headroom_is_generous_off_the_cpu(monkeypatch):
    cache = new_cache(1)
    monkeypatch.setattr(kv_cache, "HEADROOM", {})  # as for any device that it does not name
    cache.add(np.array([9]), 1000)
    assert cache.cohorts[0].positions == 20
