"""The repeat detector against a twin that counts every occurrence again after every token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core._C import RepeatDetector, push_all

# Few distinct tokens, or hardly any window would come back; the ends of int32 are digits as well.
TOKENS = st.lists(st.sampled_from([0, 1, 7, 2**31 - 1, -(2**31)]), max_size=60)
WINDOWS = st.integers(1, 7)
COUNTS = st.integers(2, 5)


def repeats(tokens: list[int], window: int, count: int) -> bool:
    """The definition: the last `window` tokens stand at least `count` times in `tokens`."""
    if len(tokens) < window:
        return False
    starts = range(len(tokens) - window + 1)
    return sum(tokens[i : i + window] == tokens[-window:] for i in starts) >= count


def repeats_after_each(tokens: list[int], window: int, count: int) -> list[bool]:
    return [repeats(tokens[: i + 1], window, count) for i in range(len(tokens))]


@given(TOKENS, WINDOWS, COUNTS)
def test_push_agrees_with_definition(tokens: list[int], window: int, count: int) -> None:
    detector = RepeatDetector(window, count)
    assert [detector.push(token) for token in tokens] == repeats_after_each(tokens, window, count)
    assert detector.size() == len(tokens)


@given(TOKENS, WINDOWS, COUNTS, st.integers(0, 60))
def test_extend_is_many_pushes(tokens: list[int], window: int, count: int, cut: int) -> None:
    """A trajectory opened again feeds its earlier tokens at once; the rest must not notice."""
    expected = repeats_after_each(tokens, window, count)
    earlier, later = expected[:cut], expected[cut:]
    detector = RepeatDetector(window, count)
    first = detector.extend(np.array(tokens[:cut], np.int32))
    assert first == (earlier.index(True) if True in earlier else -1)
    assert [detector.push(token) for token in tokens[cut:]] == later


@given(st.lists(st.tuples(TOKENS, WINDOWS, COUNTS), max_size=5), st.integers(-1, 1))
def test_push_all_is_one_push_each(rows: list[tuple[list[int], int, int]], token: int) -> None:
    together = [RepeatDetector(window, count) for _, window, count in rows]
    for detector, (tokens, _, _) in zip(together, rows, strict=True):
        detector.extend(np.array(tokens, np.int32))
    answers = push_all(together, np.full(len(rows), token, np.int32))
    assert answers.dtype == np.bool_
    assert answers.tolist() == [repeats([*tokens, token], w, c) for tokens, w, c in rows]


def test_the_same_detector_may_stand_twice_in_push_all() -> None:
    detector = RepeatDetector(window=1, count=2)
    answers = push_all([detector, detector], np.array([4, 4], np.int32))
    assert answers.tolist() == [False, True]


@pytest.mark.parametrize("period", [1, 3, 50, 51])
def test_loop_is_found_when_its_last_window_completes(period: int) -> None:
    """Periods below, at and above the window. Behind enough noise for the table to have grown."""
    window, count = 50, 3
    noise = np.random.default_rng(0).integers(1000, 2**31, 20_000)
    loop = np.tile(np.arange(period), 200)
    detector = RepeatDetector(window, count)
    assert detector.extend(noise.astype(np.int32)) == -1
    assert detector.extend(loop.astype(np.int32)) == window + (count - 1) * period - 1


@pytest.mark.parametrize(
    ("window", "count", "message"),
    [
        (0, 2, "window = 0: it must be at least 1"),
        (-5, 2, "window = -5: it must be at least 1"),
        (1, 1, "count = 1: it must be at least 2"),
    ],
)
def test_constructor_names_value_and_bound(window: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepeatDetector(window, count)


def test_tokens_that_do_not_fit_are_refused() -> None:
    detector = RepeatDetector(window=1, count=2)
    with pytest.raises(TypeError):
        detector.extend(np.array([2**31], np.int64))
    with pytest.raises(ValueError, match="2 dimensions"):
        detector.extend(np.zeros((2, 2), np.int32))
    assert detector.size() == 0


def test_strided_tokens_are_read_in_order() -> None:
    detector = RepeatDetector(window=2, count=2)
    interleaved = np.array([1, 9, 2, 8, 1, 7, 2, 6], np.int32)
    assert detector.extend(interleaved[::2]) == 3


def test_push_all_refuses_a_bad_step_and_pushes_nothing() -> None:
    detectors = [RepeatDetector(window=1, count=2) for _ in range(2)]
    with pytest.raises(ValueError, match="3 tokens into 2 detectors"):
        push_all(detectors, np.zeros(3, np.int32))
    with pytest.raises(TypeError):
        push_all([detectors[0], None], np.zeros(2, np.int32))
    assert [detector.size() for detector in detectors] == [0, 0]
