"""A fleet of engines and one engine: the same tokens, whoever is lost and whenever."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
from fleet_workers import ROWS, SAMPLED, VOCAB, Door, Local, fleet_of, model
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.rollout import fleet as fleet_module
from kimi_core.rollout import wire
from kimi_core.rollout.engine import EngineFailed
from kimi_core.rollout.fleet import RESTARTS
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import END_REASONS, Request, Segment


@pytest.fixture(scope="module")
def engines() -> list[TorchEngine]:
    return [TorchEngine(model(), batch_rows=ROWS) for _ in range(3)]


def requests_of(n: int) -> list[Request]:
    """Contexts and budgets of mixed lengths; every three trajectories share a context."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(2, VOCAB, rng.integers(2, 20)).astype(np.int32) for _ in range(n)]
    budgets, remaining = rng.integers(1, 25, n), rng.integers(10, 40, n)
    return [
        Request(7 * i, contexts[i // 3], 2, int(budgets[i]), int(remaining[i])) for i in range(n)
    ]


def answers(parts: Iterable[Iterable[Segment]]) -> dict[int, tuple[list[int], str | None]]:
    """Trajectory → its tokens, and why it ended."""
    tokens, reasons = defaultdict(list), {}
    for segments in parts:
        for one in segments:
            assert reasons.get(one.trajectory_id) is None  # Nothing comes after the end.
            tokens[one.trajectory_id] += one.token_ids.tolist()
            reasons[one.trajectory_id] = one.end_reason
    return {key: (tokens[key], reasons[key]) for key in sorted(tokens)}


def test_a_fleet_without_workers_says_why_none_comes(engines, monkeypatch):
    door = Door([])
    door.take = lambda: []
    fleet = fleet_of(exact=False, door=door)
    door.why = "no host has room"
    with pytest.raises(EngineFailed, match="There is no rollout worker: no host has room"):
        list(fleet.generate(requests_of(3), SAMPLED))
    door.why = ""
    monkeypatch.setattr(fleet_module, "COME_S", 0.01)
    with pytest.raises(EngineFailed, match=r"none has joined for 0\.01 s"):
        list(fleet.generate(requests_of(3), SAMPLED))


@pytest.mark.nightly
@settings(deadline=None, max_examples=25)
@given(
    workers=st.integers(1, 3),
    n=st.integers(1, 20),
    exact=st.booleans(),
    seed=st.integers(0, 1 << 30),
    danger=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_the_tokens_of_one_engine_whoever_dies(engines, workers, n, exact, seed, danger):
    chance = np.random.default_rng(seed)
    requests = requests_of(n)
    deaths = 0

    def dies() -> bool:
        nonlocal deaths
        dead = bool(chance.random() < danger) and deaths < RESTARTS
        deaths += dead
        return dead

    expected = answers(engines[0].generate(requests, SAMPLED))
    fleet = fleet_of(*(Local(i, engines[i], dies) for i in range(workers)), exact=exact)
    deaths = 0
    assert answers(fleet.generate(requests, SAMPLED)) == expected
    assert answers(fleet.generate(requests, SAMPLED)) == expected
    assert fleet.restarts >= deaths


@settings(deadline=None, max_examples=10)
@given(n=st.integers(1, 20), seed=st.integers(0, 1 << 30), danger=st.sampled_from([0.0, 0.05, 0.3]))
@pytest.mark.nightly
def test_workers_that_join_in_the_middle_and_are_lost_for_good(engines, n, seed, danger):
    chance = np.random.default_rng(seed)
    requests = requests_of(n)
    expected = answers(engines[0].generate(requests, SAMPLED))
    coming = [
        Local(int(number), engines[number], lambda: bool(chance.random() < danger), joins=True)
        for number in chance.integers(1, 3, 6)  # Some come again, before or after they are lost.
    ]
    fleet = fleet_of(Local(0, engines[0]), exact=False, door=Door(coming))
    for _ in range(3):
        assert answers(fleet.generate(requests, SAMPLED)) == expected
    numbers = [one.number for one in fleet._workers]
    assert numbers[0] == 0 and len(set(numbers)) == len(numbers)
    assert fleet.restarts + len(numbers) - 1 == 6 - len(coming)


def test_exact_deals_by_the_requests_alone_and_keeps_groups_together(engines):
    local = [Local(i, engines[i]) for i in range(2)]
    fleet = fleet_of(*local)
    bits = [
        [part.logprobs.tobytes() for part in sorted(parts, key=lambda part: part.worker)]
        for parts in (list(fleet.generate(requests_of(12), SAMPLED)) for _ in range(2))
    ]
    assert bits[0] == bits[1]
    for one in local:
        assert len(one.fed) == 2 and one.fed[0] == one.fed[1] and len(one.fed[0]) == 6
        assert len({key // 21 for key in one.fed[0]}) == 2  # Groups of three.


def test_without_exact_a_worker_holds_little_more_than_its_rows(engines):
    local = [Local(i, engines[i]) for i in range(2)]
    list(fleet_of(*local, exact=False).generate(requests_of(20), SAMPLED))
    assert all(len(one.fed) > 1 and len(one.fed[0]) <= 2 * ROWS for one in local)
    assert sorted(key for one in local for keys in one.fed for key in keys) == [
        7 * i for i in range(20)
    ]


def test_a_call_that_was_given_up_leaves_nothing(engines):
    fleet = fleet_of(*(Local(i, engines[i]) for i in range(2)))
    expected = answers(engines[2].generate(requests_of(6), SAMPLED))
    stream = fleet.generate(requests_of(12), SAMPLED)
    next(stream)
    with pytest.raises(ValueError, match="generating already"):
        next(fleet.generate(requests_of(2), SAMPLED))
    with pytest.raises(ValueError, match="under way"):
        fleet.serve(1)
    stream.close()
    assert answers(fleet.generate(requests_of(6), SAMPLED)) == expected
    assert list(fleet.generate([], SAMPLED)) == []


def test_segments_that_nobody_asked_for_cost_a_worker_its_place(engines):
    local = [Local(i, engines[i]) for i in range(2)]
    fleet = fleet_of(*local)
    expected = answers(engines[2].generate(requests_of(9), SAMPLED))
    foreign = Segment(7 * 8, np.array([3], np.int32), np.zeros(1, np.float32), 0, None)
    for wrong in (foreign, Segment(5, foreign.token_ids, foreign.logprobs, 0, None)):
        before, stream = fleet.restarts, fleet.generate(requests_of(9), SAMPLED)
        parts = [next(stream)]
        owner = next(one for one in local if 7 * 8 not in one.fed[-1])
        owner.said.append(owner._message(wire.SEGMENTS, [wrong]))
        assert answers([*parts, *stream]) == expected
        assert fleet.restarts == before + 1


def test_what_cannot_go_on_is_an_error_that_says_why(engines):
    local = [Local(i, engines[i]) for i in range(2)]
    fleet = fleet_of(*local)
    with pytest.raises(ValueError, match="attends to 96 positions"):
        fleet.generate([Request(0, np.zeros(90, np.int32), 1, 50, 50)], SAMPLED)
    local[1].fault = "version 1 was refused: damaged"
    with pytest.raises(EngineFailed, match=r"worker 1 does not serve version 1.*damaged"):
        fleet.serve(1)
    assert fleet.policy_version == 0

    fleet = fleet_of(*local[:1])
    with pytest.raises(EngineFailed, match="serves version 0 of the weights and not 1"):
        fleet.serve(1)
    with pytest.raises(ValueError, match="versions only grow"):
        fleet.serve(-1)

    deadly = Local(0, engines[0])
    fleet = fleet_of(deadly)
    deadly.dies = lambda: True
    with pytest.raises(EngineFailed, match=f"on purpose; it was started {RESTARTS} times"):
        list(fleet.generate(requests_of(2), SAMPLED))


@given(
    lengths=st.lists(st.integers(1, 5), max_size=6),
    version=st.integers(0, (1 << 31) - 1),
    call=st.integers(0, 1 << 30),
    cut=st.integers(0, 200),
)
def test_messages_come_out_as_they_went_in(lengths, version, call, cut):
    rng = np.random.default_rng(0)
    segments = [
        Segment(
            int(rng.integers(1 << 60)),
            rng.integers(0, 9, n).astype(np.int32),
            rng.random(n, np.float32),
            version,
            END_REASONS[rng.integers(4)],
        )
        for n in lengths
    ]
    sent = wire.packed(wire.SEGMENTS, call=call, policy_version=version, steps=3, segments=segments)
    came = wire.unpacked(sent, worker=2)
    assert (came.kind, came.call, came.policy_version, came.steps) == (2, call, version, 3)
    assert (came.segments is None) == (not segments)
    for one, other in zip(segments, came.segments or (), strict=True):
        assert (one.trajectory_id, one.end_reason) == (other.trajectory_id, other.end_reason)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    if segments and cut < len(sent):
        with pytest.raises(ValueError, match=r"no header|claims"):
            wire.unpacked(sent[:cut], worker=2)


def test_columns_that_cannot_be_are_refused():
    ids, logprobs = np.array([3, 4], np.int32), np.array([-1, -2], np.float32)
    good = wire.packed(wire.SEGMENTS, segments=[Segment(5, ids, logprobs, 0, None)])
    edges = wire.HEADER.size + 8 + 4 * 2 + 4 * 2
    for place, wrong, why in [
        (edges, b"\x01", "share its 2 tokens"),
        (edges + 4, b"\x01", "share its 2 tokens"),
        (len(good) - 1, b"\x04", "share its 2 tokens"),
        (edges - 4, np.float32(np.nan).tobytes(), "not finite"),
    ]:
        bad = good[:place] + wrong + good[place + len(wrong) :]
        with pytest.raises(ValueError, match=why):
            wire.unpacked(bad, worker=0)


def test_a_fault_is_text_whatever_its_bytes_are():
    message = wire.packed(wire.FAULT, text="out of memory")
    assert wire.unpacked(message, 0).text == "out of memory"
    assert "�" in wire.unpacked(message + b"\xff", 0).text
