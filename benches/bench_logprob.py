"""The fused loss beside its peers and the bare matrix products, CPU seconds and peak memory.

    pip install '.[bench]'                         # the peers
    pytest benches/bench_logprob.py                # about 25 minutes of CPU
    pytest benches/bench_logprob.py -k "linear or drift"

T = 4096 tokens, D = 576, V = 49,152 (SmolLM2's head), float32, one thread. Every peer gives each
response's tokens their own coefficient, as the loss asks for, and arrives at the same gradients,
which is asserted after timing. Peers run in turn with ours, round by round, in one process. *gemm*
is the limit: the three matrix products of a chunk and nothing else. Peak memory is that of the
process (Linux alone tells it), above what stood before and without the gradients.
"""

import ctypes
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kimi_core.kernels import linear_logprob, omd_loss
from kimi_core.models.load import load_pretrained
from kimi_core.trainer import objectives
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch, TrainingBatch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.benchmark(timer=time.process_time)]

T, D, V, CHUNK = 4096, 576, 49152, 512
TILE_BYTES = 4 * CHUNK * V
TAU = 0.1


@dataclass
class Problem:
    """Leaves, and the coefficient that each token's log-prob has in the loss."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    ref: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    coefficient_t: Tensor
    responses: int

    def gradients(self) -> tuple[Tensor, Tensor]:
        found = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return found


@cache
def problem(responses: int, tokens: int = T, width: int = D) -> Problem:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).requires_grad_()
    weight = (torch.randn(V, width, generator=draw) / width**0.5).requires_grad_()
    ids = torch.randint(V, (tokens,), generator=draw)
    advantages = torch.linspace(-1, 1.5, responses, dtype=torch.float64)
    ref = torch.full((tokens,), -math.log(V) - 0.5)
    cu_seqlens = torch.arange(0, tokens + 1, tokens // responses)
    made = Problem(hidden, weight, ids, ref, advantages, cu_seqlens, ref, responses)
    with torch.no_grad():
        coefficient_n = ours(made).coefficient_n / responses
    made.coefficient_t = coefficient_n.float().repeat_interleave(tokens // responses)
    return made


def ours(p: Problem, **options):
    return omd_loss(
        p.hidden, p.weight, p.ids, p.ref, p.advantages, p.cu_seqlens, tau=TAU, **options
    )


def fused(p: Problem, **options) -> None:
    ours(p, **options).loss.backward()


def two_pass(p: Problem) -> None:
    fused(p, schedule="two_pass")


@torch.no_grad()
def gemm(p: Problem) -> None:
    tile, dhidden = torch.empty(CHUNK, V), torch.empty_like(p.hidden)
    dweight = torch.empty_like(p.weight)
    for start in range(0, len(p.ids), CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(p.hidden[rows], p.weight.T, out=tile)
        torch.mm(tile, p.weight, out=dhidden[rows])
        dweight.addmm_(tile.T, p.hidden[rows], beta=int(start > 0))


def naive(p: Problem) -> None:
    losses_t = F.cross_entropy(p.hidden @ p.weight.T, p.ids, reduction="none")
    (losses_t * -p.coefficient_t).sum().backward()


def native(p: Problem, chunk: int | None) -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    losses_t = F.linear_cross_entropy(p.hidden, p.weight, p.ids, reduction="none", options=options)
    (losses_t * -p.coefficient_t).sum().backward()


def checkpointed(p: Problem) -> None:
    def part(hidden: Tensor, ids: Tensor, coefficient: Tensor) -> Tensor:
        losses = F.cross_entropy(hidden @ p.weight.T, ids, reduction="none")
        return (losses * -coefficient).sum()

    rows = (p.hidden.split(CHUNK), p.ids.split(CHUNK), p.coefficient_t.split(CHUNK))
    sum(checkpoint(part, *r, use_reentrant=False) for r in zip(*rows, strict=True)).backward()


def cce(p: Problem) -> None:
    from cut_cross_entropy import linear_cross_entropy

    losses_t = linear_cross_entropy(
        p.hidden, p.weight, p.ids, impl="torch_compile", reduction="none"
    )
    (losses_t * -p.coefficient_t).sum().backward()


def liger(p: Problem) -> None:
    """At the policy that sampled, GRPO's gradient in a log-prob is −A / length: the coefficient is
    handed over as the advantage."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = len(p.ids) // p.responses
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    found = loss(
        p.hidden.view(p.responses, length, D),
        p.weight,
        p.ids.view(p.responses, length),
        torch.ones(p.responses, length),
        -p.coefficient_t[::length] * len(p.ids),
    )
    found[0].backward()


PEERS: dict[str, tuple[Callable[[Problem], None], float | None, str]] = {
    "gemm": (gemm, 1 / 1.10, ""),
    "two passes": (two_pass, None, ""),
    "naive cross_entropy": (naive, None, ""),
    "native none, chunk 512": (partial(native, chunk=512), 1.3, ""),
    "native none, default": (partial(native, chunk=None), None, ""),
    "checkpoint, chunk 512": (checkpointed, None, ""),
    "CCE torch_compile": (cce, None, "cut_cross_entropy"),
    "Liger GRPO": (liger, 1.4, "liger_kernel"),
}
"""The peer, how much faster ours must be, and the module that it needs."""

SLOW_PEERS = ("native none, default", "checkpoint, chunk 512")
"""Far from ours in every round: one is enough."""

ROUNDS = 3


@pytest.mark.parametrize("responses", [8, 1], ids=["8x512", "1x4096"])
def test_one_pass(benchmark, ratios, responses):
    """With one response, beside the required peers alone: to the others tokens are tokens."""
    p, title = problem(responses), f"one pass {responses}x{T // responses}"
    peers = {n: peer for n, peer in PEERS.items() if responses > 1 or peer[1] is not None}
    present = {n: peer for n, peer in peers.items() if not peer[2] or _installed(peer[2])}
    run = partial(fused, p, schedule="one_pass")
    seconds: dict[str, list[float]] = {name: [] for name in present}
    peaks, found = {}, {}

    def run_peers() -> None:
        p.gradients()  # ours, of the round before
        for name, (peer, _, _) in present.items():
            if name in SLOW_PEERS and seconds[name]:
                continue
            if not seconds[name] and name in ("CCE torch_compile", "Liger GRPO"):
                peer(p)  # compiles
                p.gradients()
            start = time.process_time()
            peaks[name] = peak_bytes(partial(peer, p))
            seconds[name].append(time.process_time() - start)
            found[name] = None if name == "gemm" else p.gradients()

    peak = peak_bytes(run)
    truth = p.gradients()
    benchmark.pedantic(run, setup=run_peers, rounds=ROUNDS)
    p.gradients()
    for name, gradients in found.items():
        for own, theirs in zip(truth, gradients or truth, strict=True):
            assert (own - theirs).norm() <= 1e-4 * own.norm(), name
    mine = benchmark.stats.stats.min
    for name, (_, minimum, _) in peers.items():
        if name not in present:
            ratios.record(title, name, math.nan, None, "missing: pip install '.[bench]'")
            continue
        best = min(seconds[name])
        detail = f"{mine:.2f} against {best:.2f} CPU-s"
        if peak is not None:
            detail += f", {beyond(peak, p):.0f} against {beyond(peaks[name], p):.0f} MB"
        ratios.record(title, name, best / mine, minimum, detail)
    if peak is not None:
        allowed = TILE_BYTES / 1e6 + 16
        detail = f"{beyond(peak, p):.1f} of {allowed:.1f} MB beyond inputs and gradients"
        ratios.record(title, "memory: a tile + 16 MB", allowed / beyond(peak, p), 1.0, detail)


def test_half_the_rows_masked(benchmark, ratios):
    p = problem(8)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.5
    full: list[float] = []

    def run_full() -> None:
        start = time.process_time()
        fused(p)
        full.append(time.process_time() - start)
        p.gradients()

    benchmark.pedantic(partial(fused, p, mask=mask), setup=run_full, rounds=ROUNDS)
    p.gradients()
    mine = benchmark.stats.stats.min
    detail = f"{mine:.2f} against {min(full):.2f} CPU-s, {int(mask.sum())} rows of {T}"
    ratios.record("half the rows masked", "all rows", min(full) / mine, 1.8, detail)


def test_time_and_memory_are_linear(benchmark, ratios):
    """T from 1k to 64k at D = 64, in one response: the long path, whose gradient is V·D once."""
    tokens = [1024 << i for i in range(7)]
    seconds, megabytes = [], []

    def sweep() -> None:
        for count in tokens:
            p = problem(1, count, 64)
            start = time.process_time()
            peak = peak_bytes(partial(fused, p, schedule="one_pass"))
            seconds.append(time.process_time() - start)
            p.gradients()
            megabytes.append(math.nan if peak is None else beyond(peak, p))
            problem.cache_clear()

    benchmark.pedantic(sweep, rounds=1)
    slope = np.polyfit(np.log(tokens), np.log(seconds), 1)[0]
    grown = (megabytes[-1] - megabytes[1]) / (tokens[-1] - tokens[1]) * 1e6
    detail = f"{' '.join(f'{s:.2f}' for s in seconds)} CPU-s at {tokens[0]} to {tokens[-1]}"
    print(f"\nseconds grow as T^{slope:.3f}; memory: {' '.join(f'{m:.0f}' for m in megabytes)} MB")
    ratios.record("T from 1k to 64k: time", f"T^{slope:.2f}", 1 / slope, 0.9, detail)
    detail = f"{grown:.0f} bytes a token beyond inputs and gradients"
    ratios.record("T from 1k to 64k: memory", "100 bytes a token", 100 / max(grown, 1), 1.0, detail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_drift(benchmark, ratios, dtype):
    """Nats that the sum of 32k log-probs of sampled tokens is off by, on peaked logits, against
    float64 of the same inputs; beside torch's log_softmax of float32 and of bfloat16 logits."""
    rows, width, vocab = 32768, 64, 4096
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw).to(dtype)
    weight = (torch.randn(vocab, width, generator=draw) * 6 / width**0.5).to(dtype)
    sums = {"ours": 0.0, "log_softmax": 0.0, "log_softmax of bfloat16 logits": 0.0}
    for part in hidden.split(2048):
        exact = torch.log_softmax(part.double() @ weight.double().T, dim=1)
        ids = torch.multinomial(exact.exp(), 1, generator=draw)
        true = exact.gather(1, ids).sum()
        logits = part.float() @ weight.float().T
        found = {
            "ours": linear_logprob(part, weight, ids[:, 0]),
            "log_softmax": torch.log_softmax(logits, dim=1).gather(1, ids),
            "log_softmax of bfloat16 logits": torch.log_softmax(
                logits.bfloat16().float(), dim=1
            ).gather(1, ids),
        }
        for name, logprobs in found.items():
            sums[name] += float(logprobs.double().sum() - true)
    benchmark.pedantic(linear_logprob, (part, weight, ids[:, 0]), rounds=1)
    title = f"drift over 32k tokens, {str(dtype)[6:]}"
    mine = abs(sums["ours"])
    ratios.record(title, "0.05 nats", 0.05 / max(mine, 1e-9), 1.0, f"{sums['ours']:+.5f} nats")
    for name in ("log_softmax", "log_softmax of bfloat16 logits"):
        ratios.record(
            title, name, abs(sums[name]) / max(mine, 1e-9), None, f"{sums[name]:+.5f} nats"
        )


class PlainPolicy(Policy):
    """The plain loss: the model's own head makes all logits of the wanted tokens."""

    def omd_loss(self, micro, responses, *, tau, normalize):
        logits = self._head(self._hidden(micro)) / self.temperature
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, micro.ids_t[:, None])[:, 0]
        losses = objectives.omd(logprobs, responses, tau=tau, normalize=normalize)
        return _Plain(losses.mean(), logprobs.detach())


@dataclass
class _Plain:
    loss: Tensor
    logprobs_t: Tensor


@pytest.mark.parametrize("shape", ["16 x 8 answers of 3, top 8 layers", "4 x 512, all layers"])
def test_training_step(benchmark, ratios, shape):
    """Forward and backward of an update of SmolLM2-135M, as the trainer makes it."""
    from kimi_core.config import TrainerConfig
    from kimi_core.models.placement import freeze_below
    from kimi_core.trainer.trainer import Trainer
    from kimi_core.weights.publish import InPlace

    model = load_pretrained("smollm2-135m", dtype="float32", device="cpu")[0]
    short = shape.startswith("16")
    freeze_below(model, 8 if short else None)
    config = TrainerConfig(tokens_per_micro_batch=2048, head_chunk=256 if short else CHUNK)
    policy = Policy(model, temperature=1.0, head_chunk=config.head_chunk)
    trainer = Trainer(policy, config, InPlace())
    trainer._master_weights()
    prompts, copies, prompt, answer = (16, 8, 18, 3) if short else (4, 1, 1, 512)
    data = _training_data(prompts, copies, prompt, answer)
    share, counted = np.arange(prompts * copies), data.tokens.mask > 0
    met = np.empty(len(counted), np.float32)
    policies = {
        "ours": policy,
        "plain": PlainPolicy(model, temperature=1.0, head_chunk=config.head_chunk),
    }
    seconds, peaks, losses, slopes = {"plain": []}, {}, {}, {}

    def step(name: str) -> None:
        trainer.policy = policies[name]
        reference = data.tokens.logprobs
        losses[name] = trainer._accumulate(data, counted, reference, share, len(share), met)

    def timed(name: str) -> None:
        model.zero_grad()  # to None: every step makes its gradients anew
        start = time.process_time()
        peaks[name] = peak_bytes(partial(step, name))
        seconds.setdefault(name, []).append(time.process_time() - start)
        slopes[name] = [p.grad for p in model.parameters() if p.grad is not None]

    timed("ours")

    def plain() -> None:
        timed("plain")
        model.zero_grad()

    benchmark.pedantic(step, ("ours",), setup=plain, rounds=2)
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)
    for own, other in zip(slopes["ours"], slopes["plain"], strict=True):
        assert (own - other).norm() <= 1e-3 * other.norm() + 1e-6
    mine = min(benchmark.stats.stats.min, *seconds["ours"])
    detail = f"{mine:.2f} against {min(seconds['plain']):.2f} CPU-s"
    ratios.record(
        f"training step, {shape}", "plain loss", min(seconds["plain"]) / mine, 1.0, detail
    )
    if peaks["ours"] is not None:
        mine, others = peaks["ours"] / 1e6, peaks["plain"] / 1e6
        detail = f"{mine:.0f} against {others:.0f} MB above the model"
        ratios.record(f"training step, {shape}", "plain loss's memory", others / mine, 1.0, detail)


def _training_data(prompts, copies, prompt, answer) -> TrainingBatch:
    """Random tokens; the copies of a prompt share it, as a group's responses do."""
    rng = np.random.default_rng(0)
    count, length = prompts * copies, prompt + answer
    ids = rng.integers(V, size=(count, length)).astype(np.int32)
    ids[:, :prompt] = np.repeat(ids[::copies, :prompt], copies, axis=0)
    mask = np.tile(np.repeat([0, 1], [prompt, answer]), count).astype(np.uint8)
    batch = Batch(
        token_ids=ids.ravel(),
        logprobs=np.full(count * length, -8.0, np.float32),
        mask=mask,
        policy_versions=np.zeros(count * length, np.int32),
        cu_seqlens=np.arange(0, count * length + 1, length, dtype=np.int32),
    )
    ones = np.ones(count)
    return TrainingBatch(
        tokens=batch,
        group_ids=np.repeat(np.arange(prompts), copies),
        rewards=ones,
        correctness=ones,
        advantages=rng.normal(size=count),
        ended_rewards=dict.fromkeys(range(prompts), ones[:copies]),
    )


def peak_bytes(run: Callable[[], None]) -> int | None:
    """Run; return the peak of the process's resident memory above what it was, where known."""
    # What was freed before and kept by the allocator would hide what the run takes, or count in
    # the peak, which is set back to what is resident.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run()
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def beyond(peak: int, p: Problem) -> float:
    """MB without the gradients of hidden and weight."""
    return (peak - 4 * (p.hidden.numel() + p.weight.numel())) / 1e6


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
