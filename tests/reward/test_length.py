import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.reward.length import length_rewards

responses = st.lists(st.tuples(st.integers(0, 131_072), st.booleans()), min_size=1, max_size=16)


def unzip(group):
    lengths, correct = zip(*group, strict=True)
    return np.array(lengths), np.array(correct)


def test_worked_example():
    rewards = length_rewards([100, 200, 300, 100, 300], [True, True, True, False, False])
    np.testing.assert_array_equal(rewards, [0.5, 0.0, -0.5, 0.0, -0.5])
    assert rewards.dtype == np.float64


@given(responses)
def test_bounds_and_wrong_is_never_rewarded(group):
    lengths, correct = unzip(group)
    rewards = length_rewards(lengths, correct)
    assert rewards.shape == lengths.shape
    assert np.all(np.abs(rewards) <= 0.5)
    assert np.all(rewards[~correct] <= 0)


@given(responses)
def test_shorter_is_never_worth_less(group):
    lengths, correct = unzip(group)
    rewards = length_rewards(lengths, correct)
    for alike in (correct, ~correct):
        by_length = np.argsort(lengths[alike], kind="stable")
        assert np.all(np.diff(rewards[alike][by_length]) <= 0)


@given(responses)
def test_right_is_never_worth_less_than_wrong_of_the_same_length(group):
    lengths, correct = unzip(group)
    right = length_rewards(lengths, np.ones_like(correct))
    wrong = length_rewards(lengths, np.zeros_like(correct))
    assert np.all(right >= wrong)


@given(responses, st.integers(0, 10_000))
def test_only_differences_of_length_count(group, shift):
    lengths, correct = unzip(group)
    np.testing.assert_array_equal(
        length_rewards(lengths + shift, correct), length_rewards(lengths, correct)
    )


@given(responses, st.randoms(use_true_random=False))
def test_order_does_not_matter(group, random):
    lengths, correct = unzip(group)
    order = np.array(random.sample(range(len(group)), len(group)))
    np.testing.assert_array_equal(
        length_rewards(lengths[order], correct[order]), length_rewards(lengths, correct)[order]
    )


@given(st.integers(0, 1000), st.lists(st.booleans(), min_size=1))
def test_equal_lengths_give_zeros(length, correct):
    np.testing.assert_array_equal(length_rewards([length] * len(correct), correct), 0)


@pytest.mark.parametrize(
    ("lengths", "correct"),
    [([1, 2], [True]), ([], []), ([[1], [2]], [[True], [False]])],
    ids=["different lengths", "empty group", "two-dimensional"],
)
def test_wrong_shapes_are_refused(lengths, correct):
    with pytest.raises(ValueError, match="Lengths of shape"):
        length_rewards(lengths, correct)


def test_scores_are_not_taken_for_correctness():
    with pytest.raises(ValueError, match="dtype float64; give bool"):
        length_rewards([1, 2], [0.5, 0.0])
