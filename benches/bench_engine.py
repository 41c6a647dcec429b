"""The embedded engine beside ``model.generate``, greedy, the same prompts, CPU seconds.

    pytest benches/bench_engine.py                 # SmolLM2-135M and a tiny model, about 7 minutes
    pytest benches/bench_engine.py -k tiny         # half a minute

*Even*: every response has the same length, so that nobody waits for anybody. *Lognormal*: lengths
are lognormal, the longest 8 times the median; ``generate`` takes the requests in batches and runs
each to its longest response, which is all it can do, and only useful tokens count. The engine is
told each row's length as its budget and makes no use of it before the row is there. Ours reports
log-probs besides, which ``generate`` is not asked for. At batch 1 nobody waits either way.

Peers run in turn with ours, round by round, in one process and on one thread. *gemm* is the limit:
the bare matrix products of the same prefill and decode steps, for batches that ended rows leave and
none enter (so that filling the free rows can beat it where lengths vary). Tokens are compared
afterwards: two rows may part only where plain logits of the two tokens are within 1e-3 of their
spread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kimi_core.models.load import load_pretrained
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Request, Sampling

GREEDY = Sampling(temperature=0, seed=0, stop_token_ids=frozenset())
BATCHES = (1, 16, 64, 256)


@dataclass(frozen=True)
class Work:
    """Prompts int32 ``[n, prompt]`` and the useful length of each response, int64 ``[n]``."""

    batch: int
    prompts: np.ndarray
    lengths: np.ndarray

    def batches(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.prompts), self.batch)]


@cache
def model_of(name: str) -> PreTrainedModel:
    if name == "smollm2":
        model = load_pretrained("smollm2-135m", dtype="float32", device="cpu")[0]
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = LlamaConfig(
            vocab_size=20, intermediate_size=256, max_position_embeddings=256, **shape
        )
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.ndim > 1):
                weight.mul_(4)  # fresh models are nearly uniform: every step would be a tie
    model.generation_config.eos_token_id = None  # lengths are given, for both
    return model


def even(model: str, batch: int) -> Work:
    tokens = 64 if model == "tiny" else {64: 8, 256: 5}.get(batch, 16)
    return _work(model, batch, np.full(batch, tokens))


def lognormal(model: str, batch: int) -> Work:
    median = {"tiny": 12, "smollm2": 4}[model]
    n = {1: 4, 16: 64, 64: 128, 256: 256}[batch]
    drawn = np.random.default_rng(batch).lognormal(np.log(median), 0.85, n)
    lengths = np.clip(np.rint(drawn), 1, 8 * median).astype(np.int64)
    lengths[lengths.argmax()] = 8 * median
    return _work(model, batch, lengths)


def _work(model: str, batch: int, lengths: np.ndarray) -> Work:
    prompt = 16 if model == "tiny" else 4 if batch == 256 else 8
    vocab = model_of(model).config.vocab_size
    prompts = np.random.default_rng(7).integers(2, vocab, (len(lengths), prompt))
    return Work(batch, prompts.astype(np.int32), lengths)


def ours(engine: TorchEngine, work: Work) -> list[np.ndarray]:
    requests = [
        Request(i, prompt, len(prompt), int(length), int(length))
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True))
    ]
    segments = sorted(
        chain.from_iterable(engine.generate(requests, GREEDY)), key=lambda s: s.trajectory_id
    )
    return [segment.token_ids for segment in segments]


def generate(model: PreTrainedModel, work: Work, static: bool) -> list[np.ndarray]:
    responses: list[np.ndarray] = []
    for rows in work.batches():
        steps = int(work.lengths[rows].max())
        config = GenerationConfig(do_sample=False, max_new_tokens=steps, pad_token_id=0)
        if static:
            config.cache_implementation, config.disable_compile = "static", True
        ids = torch.from_numpy(work.prompts[rows]).long()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        made = out[:, ids.shape[1] :].numpy()
        assert made.shape == (len(ids), steps)
        responses += [row[:n] for row, n in zip(made, work.lengths[rows], strict=True)]
    return responses


@torch.inference_mode()
def bare_gemms(model: PreTrainedModel, work: Work) -> None:
    """The weights' products of the work, dense: what no engine can do without."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inputs: dict[tuple[int, int], torch.Tensor] = {}

    def multiply(linear: torch.nn.Module, rows: int) -> None:
        shape = (rows, linear.in_features)
        linear(inputs.setdefault(shape, torch.ones(shape)))

    for rows in work.batches():
        lengths = work.lengths[rows]
        for linear in linears:
            multiply(linear, work.prompts[rows].size)
        multiply(head, len(lengths))
        # Step t has the rows that need more than t tokens; the prefill made the first ones.
        for step in range(1, lengths.max()):
            for linear in [*linears, head]:
                multiply(linear, int((lengths > step).sum()))


def assert_same_tokens(
    model: PreTrainedModel, work: Work, given: list[np.ndarray], expected: list[np.ndarray]
) -> None:
    """Equal up to where two tokens are as good as tied; beyond it the contexts differ."""
    for prompt, left, right in zip(work.prompts, given, expected, strict=True):
        differ = np.flatnonzero(left != right)
        if not len(differ):
            continue
        context = np.concatenate([prompt, left[: differ[0]]]).astype(np.int64)
        with torch.inference_mode():
            logits = model(torch.from_numpy(context)[None], logits_to_keep=1).logits[0, -1]
        gap = abs(logits[left[differ[0]]] - logits[right[differ[0]]])
        assert gap <= 1e-3 * logits.std(), f"token {differ[0]} differs by {gap} in its logit"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", [even, lognormal], ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_engine(benchmark, ratios, name, shape, batch):
    model, work = model_of(name), shape(name, batch)
    engine = TorchEngine(model, batch_rows=batch)
    peers: dict[str, Callable[[], list[np.ndarray] | None]] = {
        "generate": lambda: generate(model, work, static=False),
        "generate static": lambda: generate(model, work, static=True),
        "gemm": lambda: bare_gemms(model, work),
    }
    if name == "smollm2" and shape is lognormal:
        del peers["generate static"]  # half of the bench's time, and never the faster one
    if name == "tiny":
        ours(engine, work)  # warm-up; at SmolLM2's size it is lost in the noise
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    outputs: dict[str, list[np.ndarray] | None] = {}

    def run_peers() -> None:
        for peer, run in peers.items():
            start = time.process_time()
            outputs[peer] = run()
            seconds[peer].append(time.process_time() - start)

    # More where nobody waits: there the ratio is near 1, and a machine has neighbours.
    close = shape is even or batch == 1
    few = 5 if batch <= 16 else 3
    rounds = (15 if close else 5) if name == "tiny" else (few if close else 1)
    wall = time.perf_counter()
    given = benchmark.pedantic(lambda: ours(engine, work), setup=run_peers, rounds=rounds)
    wall = time.perf_counter() - wall
    for peer in ("generate", "generate static"):
        if (expected := outputs.get(peer)) is not None:
            assert_same_tokens(model, work, given, expected)
    _record(benchmark, ratios, f"{name} {shape.__name__} {batch}", work, seconds, wall)


def _record(benchmark, ratios, title, work, seconds, wall) -> None:
    mine, tokens = benchmark.stats.stats.min, int(work.lengths.sum())
    benchmark.extra_info.update(useful_tokens=tokens, wall_seconds_with_peers=wall)
    varies = work.batch > 1 and len(set(work.lengths)) > 1
    for peer, taken in seconds.items():
        detail = f"{tokens / mine:.0f} against {tokens / min(taken):.0f} useful tokens/CPU-s"
        minimum = None if peer == "gemm" else 1.5 if varies else 1.0
        ratios.record(title, peer, min(taken) / mine, minimum, detail)
