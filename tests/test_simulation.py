"""The simulation of a rollout phase against closed forms, and what must hold for any phase."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Costs, Faults, Master, Phase, Rollout

INSTANT = Master(message_s=0.0, segment_s=0.0, latency_s=0.0, linger_s=1e9)


def phase(
    trajectories, *, engines=1, rows=4, costs=None, master=INSTANT, faults=None, seed=0
) -> Phase:
    return Rollout(
        trajectories,
        engines=engines,
        rows=rows,
        costs=costs or Costs(step_s=1.0, row_s=0.0, context_s=0.0, prefill_s=0.0),
        master=master,
        faults=faults or Faults(),
        rng=np.random.default_rng(seed),
    ).run()


def test_rows_of_equal_length_take_whole_batches():
    found = phase([(10, 7)] * 8, rows=4)
    assert found.seconds == pytest.approx(14) and found.steps == 14 and found.tokens == 56


def test_a_free_row_takes_the_next_request():
    # Two rows: 9 steps in one; 4 and then 3 in the other.
    assert phase([(3, 9), (2, 4), (1, 3)], rows=2).seconds == pytest.approx(9)


def test_a_step_costs_by_rows_and_contexts():
    costs = Costs(step_s=1.0, row_s=0.25, context_s=0.5, prefill_s=0.125, prefill_pair_s=0.5)
    found = phase([(4, 3)], costs=costs)
    # Prefill of 4 positions and 8 pairs; three steps with contexts of 4, 5 and 6.
    assert found.seconds == pytest.approx(0.5 + 4 + 3 * 1.25 + 0.5 * (4 + 5 + 6))
    assert found.busy_s == pytest.approx(found.seconds) and found.prefill_s == pytest.approx(4.5)


def test_the_masters_messages_take_their_time():
    master = Master(message_s=1.0, segment_s=0.5, latency_s=0.25, segment_tokens=4, linger_s=1e9)
    found = phase([(1, 8)], master=master)
    # A request arrives. Eight steps. Two segments: 0.25 + 1 + 2 × 0.5.
    assert found.seconds == pytest.approx(0.25 + 8 + 2.25)
    assert found.messages == 1 and found.master_s == pytest.approx(2)


@settings(deadline=None, max_examples=60)
@given(
    wanted=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    engines=st.integers(1, 5),
    rows=st.integers(1, 8),
    linger=st.sampled_from([0.3, 7.0, 1e9]),
    mean=st.sampled_from([30.0, 200.0, math.inf]),
    seed=st.integers(0, 5),
)
def test_every_token_arrives_once(wanted, engines, rows, linger, mean, seed):
    found = phase(
        [(5, n) for n in wanted],
        engines=engines,
        rows=rows,
        master=Master(linger_s=linger) if linger < 1e9 or mean == math.inf else Master(),
        faults=Faults(mean_s=mean, seen_s=2.0, back_s=5.0),
        seed=seed,
    )
    assert found.tokens == sum(wanted)
    ideal = max(max(wanted), sum(wanted) / (engines * rows))
    assert found.seconds >= ideal
    if not found.deaths:
        assert found.lost == 0 and found.busy_s <= engines * found.seconds
        assert found.seconds <= sum(wanted) / rows + max(wanted) + 0.01 * found.messages + 1


def test_more_engines_are_faster_and_deaths_cost_time():
    lengths = [(100, int(n)) for n in np.random.default_rng(0).lognormal(4, 1, 200) + 1]
    slow = Master(linger_s=10.0)
    one, four = phase(lengths, master=slow), phase(lengths, engines=4, master=slow)
    killed = phase(lengths, engines=4, master=slow, faults=Faults(mean_s=500.0))
    assert four.seconds < 0.5 * one.seconds
    assert killed.deaths > 0 and killed.seconds > four.seconds
