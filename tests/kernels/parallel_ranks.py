"""One of two gloo ranks of ``test_parallel.py``: ``python parallel_ranks.py RANK FOLDER``.

Every case computes the truth alone, then together, and compares; any failure is the exit status.
"""

import datetime
import sys

import pytest
import torch
import torch.distributed as dist
from flat_kernels import linear_logprob, omd_loss

RANKS = 2
LENGTHS = [3, 21, 0, 8, 9, 1]
VOCAB, WIDTH, CHUNK = 101, 13, 8
FIRST_SHARD = 60  # uneven: 60 and 41 rows
OPTIONS = {
    "plain": {},
    "capped, with bias": {
        "softcap": 2.0,
        "temperature": 0.7,
        "bias": torch.linspace(-1, 1, VOCAB),
    },
    # exp of the distance between the two shards' largest scores vanishes.
    "far apart": {"bias": torch.where(torch.arange(VOCAB) < FIRST_SHARD, 0.0, -300.0)},
}


def problem() -> dict:
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    hidden = torch.randn(tokens, WIDTH, generator=draw)
    weight = torch.randn(VOCAB, WIDTH, generator=draw)
    ids = torch.randint(FIRST_SHARD, (tokens,), generator=draw)
    ids[::3] = VOCAB - 1 - ids[::3] % 40  # some of the second shard
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "ref_logprobs": linear_logprob(hidden, weight, ids) + 0.1,
        "advantages": torch.linspace(-1, 1, len(LENGTHS)),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
    }


def run(function, inputs: dict, **options) -> list[torch.Tensor]:
    """What comes out, then the gradients of hidden, weight and (where there is one) bias."""
    given = {**inputs, **options}
    leaves = {
        name: given[name].clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if given.get(name) is not None
    }
    found = function(**{**given, **leaves})
    return [*(value.detach() for value in found), *(leaf.grad for leaf in leaves.values())]


def logprobs(advantages, cu_seqlens, ref_logprobs, **given):
    found = linear_logprob(**given, return_entropy=True, chunk=CHUNK)
    (found[0] * ref_logprobs).sum().backward()
    return found


def loss(**given):
    found = omd_loss(**given, tau=0.3, chunk=CHUNK)
    found.loss.backward()
    return found[:5]


def assert_close(found, expected, case) -> None:
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-5, atol=1e-5, msg=lambda m: f"{case}: {m}")


def vocabulary_parallel(rank: int, group: dist.ProcessGroup) -> None:
    """Every rank gets the single rank's numbers, and the gradient of its own rows."""
    inputs = problem()
    shard = slice(0, FIRST_SHARD) if rank == 0 else slice(FIRST_SHARD, VOCAB)
    mask = torch.arange(len(inputs["ids"])) % 4 > 0
    for name, options in OPTIONS.items():
        for schedule in (None, "one_pass", "two_pass"):
            function = logprobs if schedule is None else loss
            settings = {**options, "mask": mask, **({"schedule": schedule} if schedule else {})}
            alone = run(function, inputs, **settings)
            mine = {**settings, "weight": inputs["weight"][shard], "tp_group": group}
            if "bias" in options:
                mine["bias"] = options["bias"][shard]
            expected = [v[shard] if len(v.shape) and len(v) == VOCAB else v for v in alone]
            assert_close(run(function, inputs, **mine), expected, f"{name}, {schedule}")
    with pytest.raises(ValueError, match="the vocabulary allows 0 to 100"):
        linear_logprob(
            inputs["hidden"], inputs["weight"][shard], inputs["ids"] + VOCAB, tp_group=group
        )


def context_parallel(rank: int, group: dist.ProcessGroup) -> None:
    """One loss; each rank has the gradient of its tokens, and the weight's are summed."""
    inputs = problem()
    total = len(inputs["ids"])
    edges = inputs["cu_seqlens"]
    response = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    offset = torch.arange(total) - edges[response]
    shares = {
        "halves": offset * RANKS // torch.tensor(LENGTHS)[response],
        "one response on one rank": (response == 1).long(),
        "all on one rank": torch.zeros(total, dtype=torch.long),
    }
    bounds = ({}, {"schedule": "one_pass"}, {"schedule": "two_pass"}, {"workspace_bytes": 0})
    for name, owner in shares.items():
        mine = owner == rank
        local = {key: inputs[key][mine] for key in ("hidden", "ids", "ref_logprobs")}
        counts = torch.bincount(response[mine], minlength=len(LENGTHS))
        local["cu_seqlens"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        for settings in bounds:
            alone = run(loss, inputs, normalize="sqrt_length")
            given = {**inputs, **local, "normalize": "sqrt_length", "cp_group": group}
            found = run(loss, given, **settings)
            dist.all_reduce(found[-1], group=group)
            expected = [*alone[:3], alone[3][mine], found[4], alone[5][mine], alone[6]]
            assert_close(found, expected, f"{name}, {settings}")


def main() -> None:
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    vocabulary_parallel(rank, dist.group.WORLD)
    context_parallel(rank, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
