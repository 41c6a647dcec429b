"""Which prompts come next: the weights, the hard phase, and draws that follow from the seed."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kimi_core.config import CurriculumConfig
from kimi_core.prompts.curriculum import PRIOR_WEIGHT, Curriculum
from kimi_core.types import Prompt

records = st.lists(st.tuples(st.integers(0, 7), st.floats(-1, 2)), max_size=60)
configs = st.builds(
    CurriculumConfig,
    prioritized=st.booleans(),
    floor=st.floats(0.01, 1),
)


def prompts(difficulties: list[float | None]) -> list[Prompt]:
    # Ids that are not rows, so that one is not taken for the other.
    return [Prompt(100 + 3 * row, f"{row}", "", d) for row, d in enumerate(difficulties)]


def curriculum(config: CurriculumConfig, history, difficulties=(None,) * 8) -> Curriculum:
    result = Curriculum(prompts(list(difficulties)), config)
    for row, correctness in history:
        result.record(100 + 3 * row, correctness)
    return result


@given(configs, records)
def test_rates_are_shrunk_to_the_overall_one_and_weights_follow_them(config, history):
    made = curriculum(config, history)
    clipped = [(row, min(max(correctness, 0), 1)) for row, correctness in history]
    overall = (sum(c for _, c in clipped) + 1) / (len(clipped) + 2)
    for row in range(8):
        own = [c for r, c in clipped if r == row]
        rate = (sum(own) + PRIOR_WEIGHT * overall) / (len(own) + PRIOR_WEIGHT)
        weight = max(1 - rate, config.floor) if config.prioritized else 1
        assert made.success_rate(100 + 3 * row) == pytest.approx(rate)
        assert made.success_rates()[row] == pytest.approx(rate)
        assert made.weights(5)[row] == pytest.approx(weight)
        assert 0 < rate < 1


@given(configs, records, st.integers(0, 12), st.integers(0, 99))
def test_draws_are_different_prompts_and_follow_from_the_rng(config, history, count, seed):
    made = curriculum(config, history)
    drawn = made.draw(count, iteration=0, rng=np.random.default_rng(seed))
    again = made.draw(count, iteration=0, rng=np.random.default_rng(seed))
    assert drawn == again
    assert len(drawn) == min(count, 8)
    assert len({prompt.id for prompt in drawn}) == len(drawn)


@given(configs, records, records, st.integers(0, 99))
def test_its_state_carries_it_over_a_restart(config, history, later, seed):
    made = curriculum(config, history)
    saved = json.loads(json.dumps({key: value.tolist() for key, value in made.state().items()}))
    kept = made.state()["attempts"].copy()
    fresh = curriculum(config, later)
    fresh.load_state({key: np.array(value) for key, value in saved.items()})
    rng = [np.random.default_rng(seed) for _ in range(2)]
    assert made.draw(3, iteration=1, rng=rng[0]) == fresh.draw(3, iteration=1, rng=rng[1])
    made.record(100, 1.0)
    assert fresh.state()["attempts"].tolist() == kept.tolist()


@given(
    st.lists(st.none() | st.floats(0, 1), min_size=8, max_size=8),
    records,
    st.floats(0, 1),
    st.integers(0, 6),
    st.booleans(),
)
def test_the_hard_phase_leaves_only_prompts_that_are_hard_enough(
    difficulties, history, limit, iteration, prioritized
):
    config = CurriculumConfig(hard_after=3, hard_difficulty=limit, prioritized=prioritized)
    made = curriculum(config, history, difficulties)
    rates = made.success_rates()
    hard = {
        row
        for row, measured in enumerate(difficulties)
        if (1 - rates[row] if measured is None else measured) >= limit
    }
    assume(hard or iteration < 3)
    expected = hard if iteration >= 3 else set(range(8))
    assert set(np.flatnonzero(made.weights(iteration)).tolist()) == expected
    drawn = made.draw(8, iteration=iteration, rng=np.random.default_rng(0))
    assert {(prompt.id - 100) // 3 for prompt in drawn} == expected


def test_a_hard_phase_without_hard_prompts_says_how_hard_the_hardest_is():
    config = CurriculumConfig(hard_after=0, hard_difficulty=0.9)
    made = curriculum(config, [], (0.1, 0.62))
    with pytest.raises(ValueError, match=r"the hardest is 0\.62.*lower curriculum.hard_difficulty"):
        made.draw(1, iteration=0, rng=np.random.default_rng(0))


def test_prompts_are_drawn_in_proportion_to_their_failures():
    """One a draw, so that the share of a prompt is its weight; 4 standard errors at this seed."""
    history = [(row, float(success)) for row in range(8) for success in [1] * row + [0] * (8 - row)]
    made = curriculum(CurriculumConfig(floor=0.2), history)
    weights = made.weights(0)
    chance = weights / weights.sum()
    rng = np.random.default_rng(3)
    draws = 4000
    counts = np.zeros(8)
    for _ in range(draws):
        (prompt,) = made.draw(1, iteration=0, rng=rng)
        counts[(prompt.id - 100) // 3] += 1
    error = np.sqrt(chance * (1 - chance) / draws)
    assert np.all(np.abs(counts / draws - chance) < 4 * error)
    assert counts[0] > 2 * counts[7]
    assert counts[7] > 0  # solved, but seen again thanks to the floor


def many(monkeypatch) -> None:
    """Draw as from many prompts."""
    monkeypatch.setattr("kimi_core.prompts.curriculum.MANY", 1)


@pytest.mark.parametrize("hard_after", [None, 0])
def test_draws_from_many_prompts_have_the_same_distribution(monkeypatch, hard_after):
    config = CurriculumConfig(floor=0.05, hard_after=hard_after, hard_difficulty=0.4)
    history = [(row, float(n < row)) for row in range(8) for n in range(8)]
    rng = np.random.default_rng(0)
    shares = []
    for patch in (lambda _: None, many):
        patch(monkeypatch)
        made = curriculum(config, history)
        drawn = [made.draw(3, iteration=0, rng=rng) for _ in range(4000)]
        assert all(len({prompt.id for prompt in some}) == len(some) for some in drawn)
        ids = [prompt.id for some in drawn for prompt in some]
        shares.append([ids.count(100 + 3 * row) / 4000 for row in range(8)])
    # A share of 4,000 draws has a standard deviation of at most 0.008.
    np.testing.assert_allclose(shares[0], shares[1], atol=0.05)


def test_rows_of_little_weight_are_drawn_from_many_too(monkeypatch):
    many(monkeypatch)
    difficulties = [0.0] * 500 + [0.9, 0.8]
    config = CurriculumConfig(hard_after=0, hard_difficulty=0.5)
    made = curriculum(config, [], difficulties)
    drawn = made.draw(5, iteration=0, rng=np.random.default_rng(0))
    assert sorted(prompt.id for prompt in drawn) == [100 + 3 * 500, 100 + 3 * 501]
    nothing = curriculum(CurriculumConfig(hard_after=0, hard_difficulty=1), [], [0.1] * 9)
    with pytest.raises(ValueError, match=r"the hardest is 0\.10"):
        nothing.draw(5, iteration=0, rng=np.random.default_rng(0))


def test_a_state_has_only_the_prompts_that_were_tried_and_an_older_one_is_read():
    history = [(3, 0.1), (5, 0.2), (3, 0.7)]
    made = curriculum(CurriculumConfig(), history)
    state = made.state()
    assert state["rows"].tolist() == [3, 5]
    assert state["attempts"].tolist() == [2, 1]
    again = curriculum(CurriculumConfig(), [(0, 1.0)])
    again.load_state(state)
    assert again.success_rates().tolist() == made.success_rates().tolist()
    dense = {"attempts": np.zeros(8), "successes": np.zeros(8)}
    dense["attempts"][[3, 5]], dense["successes"][[3, 5]] = [2, 1], [0.8, 0.2]
    again.load_state(dense)
    np.testing.assert_allclose(again.success_rates(), made.success_rates())
