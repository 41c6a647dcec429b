import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.trainer.shares import deal

groups = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(np.array)


@given(groups, st.integers(1, 5), st.integers(0, 2**32))
def test_every_response_is_dealt_once_and_no_update_is_empty(group_ids, updates, seed):
    shares = deal(group_ids, updates, (seed,))
    assert sorted(np.concatenate(shares)) == list(range(len(group_ids)))
    assert len(shares) == min(updates, len(group_ids))
    assert all(len(share) for share in shares)


@given(groups, st.integers(1, 5), st.integers(0, 2**32))
def test_groups_stay_together_and_updates_are_of_similar_size(group_ids, updates, seed):
    names, counts = np.unique(group_ids, return_counts=True)
    shares = deal(group_ids, updates, (seed,))
    sizes = [len(share) for share in shares]
    if len(names) < updates:
        assert max(sizes) - min(sizes) <= 1
        return
    for name in names:
        assert sum(name in group_ids[share] for share in shares) == 1
    # The last group of the fullest update came when no other update had fewer responses.
    assert max(sizes) - min(sizes) <= counts.max()


def test_the_seed_decides():
    group_ids = np.repeat(np.arange(12), 4)
    first, again, other = (deal(group_ids, 3, (seed, 1)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_equal_groups_give_equal_updates(updates):
    group_ids = np.repeat(np.arange(8), 4)
    assert {len(share) for share in deal(group_ids, updates, (0,))} == {32 // updates}
