"""Packed rows without a mask: CPU seconds beside bare causal calls and beside masks, and memory.

    pytest benches/bench_attention.py    # about 5 minutes

*Bare calls* are SDPA's own causal attention of each sequence alone, forward and backward: what a
row costs if packing costs nothing. *Masks* is the layout of models that cannot be told where
sequences begin. Memory is the peak of a process above what it held with the model loaded, at head
chunks that make the logits small beside the rest.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from timing import cpu_s
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_core.models.packed_attention import Packing, Piece, attend
from kimi_core.trainer.packing import Layout, micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch

HEADS, KV_HEADS, DIM = 9, 3, 64
LONG = (8192, 4096, 4096)
MEMORY_ROWS = (16_384, 131_072)
"""Tokens of the rows whose memory is compared, in sequences of 8,192."""
SHAPES = {
    "think": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, heads=4, kv=4),
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=4, heads=9, kv=3),
}


def policy_of(name: str) -> Policy:
    shape = dict(SHAPES[name])
    heads, kv_heads = shape.pop("heads"), shape.pop("kv")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 18,
        **shape,
    )
    return Policy(LlamaForCausalLM(config).eval(), temperature=1.0, head_chunk=512)


def batch_of(lengths: list[int], *, prompt: int = 0, siblings: int = 1) -> Batch:
    """Random sequences; every ``siblings`` of them begin with the same ``prompt`` tokens."""
    rng = np.random.default_rng(0)
    edges = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = rng.integers(3, 64, edges[-1]).astype(np.int32)
    mask = np.ones(len(tokens), np.uint8)
    for index, start in enumerate(edges[:-1]):
        first = edges[index // siblings * siblings]
        tokens[start : start + prompt] = tokens[first : first + prompt]
        mask[start : start + max(1, prompt)] = 0
    blank = np.zeros(len(tokens), np.float32)
    return Batch(tokens, blank, mask, blank.astype(np.int32), edges)


def train(policy: Policy, batch: Batch, layout: Layout, max_tokens: int, share: bool) -> None:
    for micro in micro_batches(
        batch,
        batch.mask > 0,
        range(len(batch)),
        max_tokens=max_tokens,
        layout=layout,
        share_prompts=share,
    ):
        policy.logprobs(micro).sum().backward()
    for parameter in policy.parameters():
        parameter.grad = None


@pytest.mark.usefixtures("one_thread")
def test_a_long_row_costs_what_its_sequences_cost_alone(ratios):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(LONG), DIM, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    edges = np.cumsum([0, *LONG]).tolist()
    packing = Packing.of([Piece((span,)) for span in pairwise(edges)])

    def packed() -> None:
        attend(torch.nn.Identity(), q, k, v, None, packing)[0].sum().backward()

    def bare() -> None:
        for start, end in pairwise(edges):
            parts = (x[:, :, start:end] for x in (q, k, v))
            scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).sum().backward()

    ours, limit = cpu_s(packed, bare, rounds=3)
    ratios.record(
        "attention 8,192 + 2 × 4,096",
        "bare calls",
        limit / ours,
        1 / 1.1,
        f"{ours:.2f} against {limit:.2f} CPU-s",
    )


CASES = {
    "think, 64 × 100": ("think", [100] * 64, 0, 1),
    "think, 256 × 20 to 100": ("think", None, 0, 1),
    "smollm2, 4 × 512": ("smollm2", [512] * 4, 0, 1),
    "smollm2, 16 × 128": ("smollm2", [128] * 16, 0, 1),
    "smollm2, 2 × 4,096": ("smollm2", [4096] * 2, 0, 1),
    "smollm2, 4 prompts × 8": ("smollm2", [190] * 32, 150, 8),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
@pytest.mark.usefixtures("one_thread")
def test_against_masks(ratios, name, case):
    """Why ``Policy.masks_up_to`` is what it is."""
    model, lengths, prompt, siblings = case
    if lengths is None:
        lengths = np.random.default_rng(1).integers(20, 100, 256).tolist()
    policy = policy_of(model)
    assert policy.layout == "end_to_end"
    batch, share = batch_of(lengths, prompt=prompt, siblings=siblings), siblings > 1

    def run(layout: Layout) -> Callable[[], None]:
        return lambda: train(policy, batch, layout, 8192, share)

    ours, masked = cpu_s(run("end_to_end"), run("rows"), rounds=7 if model == "think" else 5)
    detail = f"{ours:.2f} against {masked:.2f} CPU-s"
    ratios.record(f"forward + backward: {name}", "masks", masked / ours, None, detail)


def peak_mb(tokens: int, layout: Layout) -> float:
    """Peak memory of forward and backward above the model, in a process of its own."""
    command = [sys.executable, __file__, str(tokens), layout]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    tokens, layout = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    policy = policy_of("think")
    batch = batch_of([8192] * (tokens // 8192))
    train(policy, batch_of([64]), "end_to_end", 64, False)  # Whatever is loaded late.
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
    before = _memory_mb("VmRSS")
    train(policy, batch, layout, tokens, False)
    print(_memory_mb("VmHWM") - before)


def _memory_mb(which: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024


def test_memory_is_linear(ratios):
    short, long = (peak_mb(tokens, "end_to_end") for tokens in MEMORY_ROWS)
    exponent = math.log(long / short) / math.log(MEMORY_ROWS[1] / MEMORY_ROWS[0])
    detail = f"{short:.0f} MB at 16,384 tokens, {long:.0f} MB at 131,072: exponent {exponent:.3f}"
    ratios.record("memory, 16,384 to 131,072 tokens", "linear", 1 / exponent, 1 / 1.1, detail)
    masked = peak_mb(16_384, "rows")
    detail = f"{short:.0f} against {masked:.0f} MB"
    ratios.record("memory, 16,384 tokens", "masks", masked / short, None, detail)


if __name__ == "__main__":
    main()
