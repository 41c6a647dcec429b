"""The trainer's seam carries FSDP2: two ranks give the gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer.sharded_ranks import LENGTHS, tiny_llama, train

import kimi_core
from kimi_core.trainer.policy import Policy

CASES = [(tied, objective) for tied in (False, True) for objective in ("omd", "grpo")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[tuple[bool, str], dict]:
    """What rank 0 of two ranks found, each with half of the responses."""
    script = Path(__file__).with_name("sharded_ranks.py")
    given = {"rendezvous": str(tmp_path_factory.mktemp("ranks") / "rendezvous"), "cases": CASES}
    root = str(Path(kimi_core.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(given)],
            env=os.environ | {"PYTHONPATH": root, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    return dict(zip(CASES, json.loads(outputs[0][0].splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("tied", "objective"), CASES)
def test_two_ranks_give_the_gradients_of_one_process(sharded, tied, objective):
    everyone = list(range(len(LENGTHS)))
    one = train(everyone, tied=tied, objective=objective, sharded=False)
    two = sharded[tied, objective]
    assert two["gradients"].keys() == one["gradients"].keys()
    largest = max(torch.tensor(value).abs().max() for value in one["gradients"].values())
    for name, expected in one["gradients"].items():
        found = torch.tensor(two["gradients"][name])
        difference = (found - torch.tensor(expected)).abs().max()
        assert difference <= 1e-5 * largest, name
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert all(two["moved"].values()), two["moved"]
    assert len(two["moved"]) == len(list(tiny_llama(tied=tied).parameters()))


def test_a_model_that_is_sharded_before_its_policy_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = tiny_llama(tied=False)
        torch.distributed.fsdp.fully_shard(model.model.layers[0])
        with pytest.raises(ValueError, match="make the Policy first"):
            Policy(model, temperature=1.0, head_chunk=16)
    finally:
        torch.distributed.destroy_process_group()
