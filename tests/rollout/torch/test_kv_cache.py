"""The cache beside a list of lists: rows enter, decode and leave, and each sees its own past."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.rollout.torch import kv_cache
from kimi_core.rollout.torch.attention import one_token
from kimi_core.rollout.torch.kv_cache import WORTH_A_COHORT, KVCache

LAYERS, HEADS, DIM = 2, 2, 3
LONGEST = 40


def new_cache(position_bytes: int, *, split: bool = True) -> KVCache:
    return KVCache(LAYERS, torch.empty(0), position_bytes, split=split)


class Checked:
    """A cache, and the keys that each row of the batch must see; values are their negative."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.rows: list[torch.Tensor] = []  # [layers, length, heads, dim] each
        self.stamp = 0.0

    def enter(self, lengths: list[int], samples: int) -> None:
        """Prefill contexts of ``lengths``, longest first, each for some rows."""
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
            self.cache.begin_prefill(
                slice(0, len(rows)), longest, contexts_m if samples > 1 else None
            )
            for layer, keys in enumerate(padded.transpose(2, 3)):
                assert self.cache.get_seq_length() == 0
                seen = self.cache.update(keys, -keys, layer)
                assert seen[0] is keys
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
                parts = update[0].cohorts
            else:
                parts = [(*update, self.cache.cohorts[0].masks[None])]
            row = 0
            for seen_keys, seen_values, mask in parts:
                assert seen_keys.isfinite().all() and seen_values.isfinite().all()
                for index in range(len(seen_keys)):
                    own = self.rows[row][layer].transpose(0, 1)
                    length = own.shape[1]
                    assert torch.equal(seen_keys[index, :, :length], own)
                    assert torch.equal(seen_values[index, :, :length], -own)
                    hidden = seen_keys.shape[2] - length
                    if hidden:
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
)
def test_every_row_sees_its_own_past(data, position_bytes, split):
    checked = Checked(new_cache(position_bytes, split=split))
    for _ in range(data.draw(st.integers(1, 6))):
        lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
        checked.enter(lengths, data.draw(st.integers(1, 3)))
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


# 300 rows of 40 positions are enough for plain products where no heads share keys.
@pytest.mark.parametrize(("rows", "length"), [(5, 11), (300, 40)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_one_token_is_that_of_sdpa(kv_heads, rows, length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, 1, 8, generator=generator)
    keys, values = torch.randn(2, rows, kv_heads, length, 8, generator=generator)
    mask = torch.zeros(rows, 1, 1, length)
    mask[2, ..., 4:] = torch.finfo(torch.float32).min
    for hidden in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double(),
            keys.double().repeat_interleave(4 // kv_heads, 1),
            values.double().repeat_interleave(4 // kv_heads, 1),
            attn_mask=None if hidden is None else hidden.double(),
            scale=0.3,
        ).transpose(1, 2)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            got = one_token(
                query.to(dtype),
                keys.to(dtype),
                values.to(dtype),
                None if hidden is None else hidden.to(dtype),
                0.3,
            )
            torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_headroom_is_generous_off_the_cpu(monkeypatch):
    cache = new_cache(1)
    monkeypatch.setattr(kv_cache, "HEADROOM", {})  # as for any device that it does not name
    cache.add(np.array([9]), 1000)
    assert cache.cohorts[0].positions == 20
