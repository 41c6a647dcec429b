"""The fused loss on a GPU beside its peers and the bare matrix products: milliseconds and memory.

    pytest benches/bench_gpu.py                    # needs a CUDA GPU, and skips without one

bfloat16, 16 responses of 512 tokens, V = 151,936 (Qwen's head). *gemm* is the limit: the three
matrix products of a chunk and nothing else. Peers run in turn with ours, round by round. How far
their gradients lie apart is shown. Peak memory is above the inputs and
without the gradients.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kimi_core.kernels import omd_loss

pytestmark = pytest.mark.gpu

V, RESPONSES, LENGTH, CHUNK = 151_936, 16, 512, 2048
T = RESPONSES * LENGTH
ROUNDS = 5


class Problem:
    """Leaves, and the coefficient that each token's log-prob has in the loss."""

    def __init__(self, width: int) -> None:
        draw = torch.Generator("cuda").manual_seed(0)
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.hidden = torch.randn(T, width, generator=draw, **options).requires_grad_()
        self.weight = torch.randn(V, width, generator=draw, **options).div_(width**0.5)
        self.weight.requires_grad_()
        self.ids = torch.randint(V, (T,), generator=draw, device="cuda")
        self.ref = torch.full((T,), -math.log(V) - 0.5, device="cuda")
        self.advantages = torch.linspace(-1, 1.5, RESPONSES, dtype=torch.float64, device="cuda")
        self.cu_seqlens = torch.arange(0, T + 1, LENGTH, device="cuda")
        with torch.no_grad():
            coefficient_n = self.loss().coefficient_n / RESPONSES
        self.coefficient_t = coefficient_n.float().repeat_interleave(LENGTH)

    def loss(self, **options):
        given = self.hidden, self.weight, self.ids, self.ref, self.advantages, self.cu_seqlens
        return omd_loss(*given, tau=0.1, **{"chunk": CHUNK, **options})

    def gradients(self):
        found = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return found


def fused(p: Problem, **options) -> None:
    p.loss(**options).loss.backward()


@torch.no_grad()
def gemm(p: Problem) -> None:
    tile = p.hidden.new_empty(CHUNK, V)
    dhidden, dweight = torch.empty_like(p.hidden), torch.empty_like(p.weight, dtype=torch.float32)
    for start in range(0, T, CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(p.hidden[rows], p.weight.T, out=tile)
        torch.mm(tile, p.weight, out=dhidden[rows])
        beta = int(start > 0)
        torch.addmm(dweight, tile.T, p.hidden[rows], torch.float32, beta=beta, out=dweight)


def naive(p: Problem) -> None:
    logits = (p.hidden @ p.weight.T).float()
    losses_t = F.cross_entropy(logits, p.ids, reduction="none")
    (losses_t * -p.coefficient_t).sum().backward()


def cce(p: Problem) -> None:
    from cut_cross_entropy import linear_cross_entropy

    losses_t = linear_cross_entropy(p.hidden, p.weight, p.ids, reduction="none")
    (losses_t * -p.coefficient_t).sum().backward()


def liger(p: Problem) -> None:
    """At the policy that sampled, GRPO's gradient in a log-prob is −A / length: the coefficient is
    handed over as the advantage."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    shape = RESPONSES, LENGTH
    counted = torch.ones(shape, device="cuda")
    advantages = -p.coefficient_t[::LENGTH] * T
    found = loss(p.hidden.view(*shape, -1), p.weight, p.ids.view(shape), counted, advantages)
    found[0].backward()


PEERS: dict[str, tuple[Callable[[Problem], None], float | None, str]] = {
    "gemm": (gemm, 1 / 1.15, ""),
    "two passes": (partial(fused, schedule="two_pass"), None, ""),
    "naive cross_entropy": (naive, 1.0, ""),
    "CCE": (cce, None, "cut_cross_entropy"),
    "Liger GRPO": (liger, None, "liger_kernel"),
}
"""The peer, how much faster ours must be, and the module that it needs."""


@pytest.mark.parametrize("width", [1024, 4096])
def test_one_pass(ratios, width):
    p, title = Problem(width), f"fused loss on a GPU, {T} x {width} x {V}"
    present = {n: peer for n, peer in PEERS.items() if not peer[2] or _installed(peer[2])}
    calls = {"ours": partial(fused, schedule="one_pass"), **{n: c[0] for n, c in present.items()}}
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks, found = {}, {}
    for name, call in calls.items():  # compiles, and measures memory
        call(p)
        p.gradients()
        peaks[name] = peak_bytes(partial(call, p))
        found[name] = p.gradients()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(milliseconds(partial(call, p)))
            p.gradients()
    differ = {
        name: max(
            float((own - theirs).norm() / own.norm())
            for own, theirs in zip(found["ours"], gradients, strict=True)
        )
        for name, gradients in found.items()
        if name != "gemm"
    }
    assert differ["two passes"] < 0.01 and differ["naive cross_entropy"] < 0.02
    mine, grown = min(times["ours"]), sum(g.nbytes for g in found["ours"])
    for name, (_, minimum, _) in PEERS.items():
        if name not in present:
            ratios.record(title, name, math.nan, None, "missing: pip install '.[bench]'")
            continue
        beyond = [(peaks[n] - (0 if n == "gemm" else grown)) / 1e9 for n in ("ours", name)]
        detail = f"{mine:.1f} against {min(times[name]):.1f} ms, {beyond[0]:.2f} against "
        detail += f"{beyond[1]:.2f} GB"
        if name in differ:
            detail += f", gradients differ by {differ[name]:.1%}"
        ratios.record(title, name, min(times[name]) / mine, minimum, detail)


def milliseconds(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(call: Callable[[], None]) -> int:
    """What the call holds at most, above what stood before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
