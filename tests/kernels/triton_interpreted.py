"""The Triton kernels in Triton's interpreter, on a CPU, against plain torch.

``test_triton.py`` runs this file in a process of its own, as the interpreter has to be chosen
before Triton is imported.

The interpreter checks indices and algebra, neither races nor rounding; its bfloat16 is wrong, so
everything is float32.
"""

import os
import sys
from itertools import pairwise

import pytest
import torch

from kimi_core.kernels import linear_logprob, omd_loss
from kimi_core.kernels.tiles import Head, Tiles
from kimi_core.kernels.triton_tiles import SegmentSum, TritonTiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"

LAUNCH = (16, 32, 16, 4, 2)
SIZES = {
    "primes": (37, 101, 23),  # nothing divides anything: tails in rows, columns and depth
    "whole blocks": (32, 64, 16),
    "one row": (1, 70, 16),
    "V < tile": (5, 3, 16),
    "many blocks of the gradient": (3, 2100, 16),  # more columns than a program of it has
    "D < tile": (17, 33, 5),
}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 1.5, "temperature": 1.3},
}


def problem(rows, vocab, width):
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=draw)
    weight = 2 * torch.randn(vocab, width, generator=draw) / width**0.5
    return hidden, weight, torch.randint(vocab, (rows,), generator=draw)


def assert_equal_tiles(hidden, head, ids):
    ours, plain = TritonTiles(head, len(ids), LAUNCH), Tiles(head, len(ids))
    for implementation in (ours, plain):
        implementation.load(hidden, ids)
    found, expected = ours.statistics(), plain.statistics()
    for name, own, true in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(own.double(), true.double(), rtol=1e-5, atol=1e-5, msg=name)
    outer = torch.linspace(-1, 2, len(ids))
    rows = (expected.top_c, expected.total_c, outer)
    torch.testing.assert_close(ours.gradient(*rows), plain.gradient(*rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_statistics_and_gradient(size, with_bias, options):
    hidden, weight, ids = problem(*size)
    bias = torch.linspace(-2, 2, len(weight)) if with_bias else None
    assert_equal_tiles(
        hidden, Head(weight, bias, **{"temperature": 1.0, "softcap": None, **options}), ids
    )


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_shifted_logits(shift):
    hidden, weight, ids = problem(20, 70, 16)
    assert_equal_tiles(hidden, Head(weight, torch.full((70,), shift), 1.0, None), ids)


def test_a_block_that_a_bias_rules_out():
    hidden, weight, ids = problem(20, 100, 16)
    bias = torch.zeros(100)
    bias[32:64] = -torch.inf
    assert_equal_tiles(hidden, Head(weight, bias, 1.0, None), ids % 32)


def test_targets_on_another_rank():
    hidden, weight, ids = problem(20, 70, 16)
    assert_equal_tiles(hidden, Head(weight, None, 1.0, None, first=35), ids)


def test_statistics_alone_leave_the_tile_unwritten():
    hidden, weight, ids = problem(20, 70, 16)
    ours = TritonTiles(Head(weight, None, 1.0, None), 20, LAUNCH)
    ours._tile_cv.fill_(7)
    ours.load(hidden, ids, keep=False)
    assert (ours._tile_cv == 7).all() and ours.statistics().logprobs().isfinite().all()


def test_sums_of_responses():
    edges = torch.tensor([0, 3, 3, 4, 2500, 2501])
    values = torch.randn(2501, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([values[a:b].double().sum() for a, b in pairwise(edges)])
    sums = SegmentSum.apply(values.requires_grad_(), edges)
    torch.testing.assert_close(sums.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    (sums * torch.arange(5)).sum().backward()
    assert torch.equal(values.grad, torch.arange(5.0).repeat_interleave(edges.diff()))


@pytest.mark.parametrize("schedule", ["one_pass", "two_pass"])
def test_the_loss_through_the_kernels_is_the_loss(schedule, monkeypatch):
    lengths = [3, 20, 0, 7, 17]
    hidden, weight, ids = problem(sum(lengths), 101, 23)
    own = linear_logprob(hidden, weight, ids)
    rest = {
        "ref_logprobs": own + 0.1,
        "advantages": torch.linspace(-1, 1, len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }

    def run():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = omd_loss(*leaves, ids, **rest, tau=0.3, chunk=8, schedule=schedule)
        found.loss.backward()
        return [found.loss.detach(), *(leaf.grad for leaf in leaves)]

    expected = run()
    made = []

    def triton_tiles(head, rows):
        made.append(TritonTiles(head, rows, LAUNCH))
        return made[-1]

    for name in ("omd_loss", "linear_logprob"):
        module = sys.modules[f"kimi_core.kernels.{name}"]  # the package's attribute is the function
        monkeypatch.setattr(module, "tiles_for", triton_tiles)
    for got, true in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)
    assert made
