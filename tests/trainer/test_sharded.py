"""Ranks over gloo: the gradients of one process, faults on all, arenas and files by blocks."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer.sharded_ranks import (
    ARENAS,
    CASES,
    NANS,
    OTHERS,
    dpo_losses,
    gradients,
    sft_losses,
    tiny_llama,
)
from warm import Warm

from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, deal

OFTEN = {
    *("FSDP, tied", "FSDP", "FSDP, a rank with nothing", "TP, tied", "CP, tied"),
    *("TP, untied, uneven vocabulary", "TP × FSDP, unequal passes"),
    *("TP, norms of heads", "CP, one head of keys"),  # The check with the oldest transformers.
    *("FSDP, images, many passes", "FSDP, images, a rank without", "states of images"),
    *("NaN on rank 1", "late, FSDP", "arena, float32", "arena, engine of two ranks", "states"),
}
"""The work that is not left to the night."""


STATES = ("states", "states of adapters", "states of images", "states of four")


def cases(names: Iterable[str]) -> list:
    return [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly) for name in names
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    for name in ("sft", "sft of four"):
        (path / name).mkdir()
    return path


@pytest.fixture(scope="module")
def found(folder, request) -> dict[str, list]:
    """By name: what each rank found that took part, in the order of the ranks.

    Of the work with a name of its test, only what the chosen tests ask for is done.
    """
    script = Path(__file__).with_name("sharded_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    chosen = [one for one in request.session.items if one.path == request.path]
    names = {one.callspec.params["name"] for one in chosen if "name" in one.fixturenames}
    if any("found" in one.fixturenames and "name" not in one.fixturenames for one in chosen):
        names |= OTHERS
    processes = [Warm([script, rank, folder, *names], env=environment) for rank in range(4)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    united: dict[str, list] = {}
    for rank in range(4):
        one = torch.load(folder / f"rank {rank}", weights_only=False)
        for name, value in one.items():
            united.setdefault(name, []).append(value)
    return united


@pytest.mark.parametrize("name", cases(CASES))
def test_ranks_give_the_gradients_of_one_process(found, name):
    case = CASES[name]
    one, (first, *others) = gradients(case), found[name]
    assert len(others) == case.ranks - 1
    # In 16 bits each rank rounds the gradients of its part, and then their sum is rounded.
    close = 1e-5 if case.dtype == "float32" else 2e-2
    for rank in (first, *others):
        assert rank["gradients"].keys() == one["gradients"].keys()
        largest = max(value.abs().max() for value in one["gradients"].values())
        for parameter, expected in one["gradients"].items():
            difference = (rank["gradients"][parameter] - expected).abs().max()
            assert difference <= close * largest, parameter
        for metric in ("norm", "loss", "entropy", "gap"):
            assert rank[metric] == pytest.approx(one[metric], rel=close, abs=close), metric
            assert rank[metric] == first[metric], metric
        assert rank["fingerprint"] == one["fingerprint"]
        assert rank["recomputed"] == one["recomputed"] == (case.age == 0)
        # The last norm of this tower has no part in its features.
        still = [name for name, moved in rank["moved"].items() if not moved]
        assert all("post_layernorm" in name for name in still) and rank["moved"] == one["moved"]
    for values in ("logprobs", "entropies"):
        assert first[values] == pytest.approx(one[values], rel=close, abs=close)


def test_sft_has_the_losses_of_one_process_and_goes_on_with_other_ranks(found, folder):
    expected = sft_losses()
    assert len(expected) == 4
    assert found["sft"][0] == pytest.approx(expected, rel=1e-5)
    # Two ranks saved after two steps, and four, divided in another way, went on and saved again.
    assert found["sft on four"][0] == pytest.approx(expected[2:], rel=1e-4)
    last = sft_losses(resume=(3, folder / "sft of four"))
    assert last == pytest.approx(expected[3:], rel=1e-4)


def test_sft_with_images_that_only_rank_0_can_read(found):
    assert found["sft with images"][0] == pytest.approx(
        sft_losses(case=CASES["FSDP, images"]), rel=1e-5
    )


def test_no_rank_keeps_the_whole_model(found):
    assert found["whole parameters"] == [0, 0]


def test_ranks_leave_sft_together(found):
    assert found["sft stops"] == [1, 1]


def test_dpo_has_the_losses_of_one_process(found):
    expected = dpo_losses()
    assert len(expected) == 3
    assert found["dpo"][0] == pytest.approx(expected, rel=1e-5)
    expected = dpo_losses(case=CASES["CP × replicas"])
    assert found["dpo on four"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", cases(NANS))
def test_a_nan_on_one_rank_is_the_same_error_on_all(found, name):
    case, broken = NANS[name]
    first, *others = found[name]
    assert len(others) == case.ranks - 1
    assert f"rank {broken}: " in first["said"] and "the update was not taken" in first["said"]
    for rank in (first, *others):
        assert rank["said"] == first["said"] and rank["same"]
        assert rank["seconds"] < 30  # The limit of a collective is 60.


@pytest.mark.parametrize("name", cases(["late, FSDP", "late, CP"]))
def test_a_rank_that_does_not_come_is_noticed_after_the_time_limit(found, name):
    assert 0.9 < found[name][0] < 30


@pytest.mark.parametrize("name", cases(ARENAS))
def test_arenas_have_the_bytes_of_the_whole_publication(found, name):
    same = found[name][0]["same"]
    assert len(same) == 2 * ARENAS[name][2] and all(same)


@pytest.mark.parametrize("name", cases(STATES))
def test_states_and_checkpoints_are_whole_for_any_number_of_ranks(found, name):
    for rank in found[name]:
        assert all(rank.values()) and len(rank) == 6, rank


@given(st.lists(st.integers(0, 50_000), max_size=40), st.integers(1, 9))
def test_dealing(sizes, hands):
    dealt = deal(sizes, hands)
    assert len(dealt) == hands
    assert sorted(index for hand in dealt for index in hand) == list(range(len(sizes)))
    fullest = max((sum(sizes[index] for index in hand) for hand in dealt), default=0)
    # What the longest first, each into the emptiest hand, exceeds at most; the limit grows by 1/64.
    most = sum(sizes) / hands + max(sizes, default=0)
    assert fullest <= 65 / 64 * most + 1


def test_one_process_needs_no_group():
    alone = Ranks()
    assert alone.gather("thing") == [alone.own(["thing"])] == ["thing"]
    assert alone.sum(3.5) == 3.5 and alone.largest(2) == 2 and alone.fault("it") == "it"
    assert alone.everywhere("thing") == "thing"
    assert list(alone.passes(iter("ab"))) == ["a", "b"]
    alone.close()
    assert not torch.distributed.is_initialized()


def test_a_model_that_is_sharded_before_its_policy_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = tiny_llama()
        torch.distributed.fsdp.fully_shard(model.model.layers[0])
        with pytest.raises(ValueError, match="make the Policy first"):
            Policy(model, temperature=1.0, head_chunk=16)
    finally:
        torch.distributed.destroy_process_group()
