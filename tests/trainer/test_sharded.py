"""Two ranks over gloo: the gradients of one process, faults on all, arenas and files by rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer.sharded_ranks import CASES, gradients, sft_losses, tiny_llama

import kimi_core
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, deal


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two ranks found."""
    script = Path(__file__).with_name("sharded_ranks.py")
    folder = tmp_path_factory.mktemp("ranks")
    given = {"rendezvous": str(folder / "rendezvous"), "folder": str(folder)}
    root = str(Path(kimi_core.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(given)],
            env=os.environ | {"PYTHONPATH": root, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_gradients_of_one_process(ranks, name):
    one, (two, other) = gradients(CASES[name]), (found[name] for found in ranks)
    assert two == other
    # In 16 bits each rank rounds the gradients of its sequences, and then their sum is rounded.
    close = 1e-5 if CASES[name].dtype == "float32" else 2e-2
    assert two["gradients"].keys() == one["gradients"].keys()
    largest = max(torch.tensor(value).abs().max() for value in one["gradients"].values())
    for parameter, expected in one["gradients"].items():
        found = torch.tensor(two["gradients"][parameter])
        difference = (found - torch.tensor(expected)).abs().max()
        assert difference <= close * largest, parameter
    for metric in ("norm", "loss", "entropy", "logprobs", "gap"):
        assert two[metric] == pytest.approx(one[metric], rel=close, abs=close), metric
    assert two["fingerprint"] == one["fingerprint"]
    assert two["recomputed"] == one["recomputed"] == (CASES[name].age == 0)
    assert all(two["moved"].values()), two["moved"]


def test_sft_has_the_losses_of_one_process(ranks):
    assert len(ranks[0]["sft"]) == 4
    assert ranks[0]["sft"] == pytest.approx(sft_losses(), rel=1e-5)


@pytest.mark.parametrize("broken", range(2))
def test_a_nan_on_one_rank_is_the_same_error_on_all(ranks, broken):
    first, second = (found[f"nan on {broken}"] for found in ranks)
    assert first["said"] == second["said"]
    assert f"rank {broken}: " in first["said"] and "the update was not taken" in first["said"]
    assert first["same"] and second["same"]
    assert max(first["seconds"], second["seconds"]) < 30  # The limit of a collective is 60.


@pytest.mark.parametrize("arena", ["float32 1", "bfloat16 1", "bfloat16 2", "tied"])
def test_arenas_have_the_bytes_of_the_whole_publication(ranks, arena):
    same = ranks[0][f"arena {arena}"]["same"]
    assert len(same) == 2 * (1 + arena.endswith("2")) and all(same)


def test_states_and_checkpoints_are_whole_for_any_number_of_ranks(ranks):
    for found in ranks:
        assert all(found["states"].values()) and len(found["states"]) == 5, found["states"]


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
