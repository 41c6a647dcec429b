"""Memory of a training pass: what is measured against the formula that plans it.

Two layers of SmolLM2's shape, forward and backward, in a process for each length. Each row packs
three sequences: a half and two quarters of its tokens. The vocabulary has 1,000 tokens, because
the loss has a bench already. The memory is the peak of the process over what it held before the
pass, with gradients in place. Freed blocks return to the system (``MALLOC_MMAP_THRESHOLD_``); with
glibc's defaults up to 1.4 times as much was seen.

The model of ``configs/long.toml`` gets one sequence of 131,072 tokens.
"""

import json
import math
import sys
from pathlib import Path

import pytest
from timing import in_a_process, status

LENGTHS = (8192, 16384, 32768)
MOST_AT_32K = 1.2e9
LONGEST, MOST_AT_LONGEST = 131_072, 1e9
EXPONENT = 1.1


@pytest.mark.parametrize("memory_gb", [100.0, 0.75])
def test_a_pass_that_keeps_much(ratios, memory_gb):
    found = in_a_process(__file__, LENGTHS[0], memory_gb, "smollm2")
    _record(ratios, LENGTHS[0], found)


def test_a_pass_that_recomputes_everything(ratios):
    peaks = {}
    for tokens in LENGTHS:
        found = in_a_process(__file__, tokens, 0.001, "smollm2")
        assert found["layers"] == 2 and found["chunked"]
        _record(ratios, tokens, found)
        peaks[tokens] = found["measured"]
    exponent = math.log(peaks[LENGTHS[-1]] / peaks[LENGTHS[0]]) / math.log(4)
    ratios.record("activations of 32,768 tokens", "1.2 GB", MOST_AT_32K / peaks[LENGTHS[-1]], 1.0)
    ratios.record(
        "growth of activations", "exponent 1.1", EXPONENT / exponent, 1.0, f"{exponent:.2f}"
    )


def test_the_longest_context(ratios):
    found = in_a_process(__file__, LONGEST, 0.001, "long")
    _record(ratios, LONGEST, found)
    ratios.record("activations, long.toml", "1 GB", MOST_AT_LONGEST / found["measured"], 1.0)


def _record(ratios, tokens: int, found: dict[str, float]) -> None:
    how = f"{found['layers']} layers recomputed" + ", MLP in chunks" * bool(found["chunked"])
    detail = f"{found['measured'] / 1e6:.0f} MB measured, {found['planned'] / 1e6:.0f} planned"
    ratio = found["planned"] / found["measured"]
    ratios.record(f"{tokens} tokens, {how}", "measured memory", ratio, 0.9, detail)
    assert ratio < 1.25


def _main(tokens: int, memory_gb: float, shape: str) -> None:
    import numpy as np
    import torch

    from kimi_core.trainer.activations import Recompute
    from kimi_core.trainer.packing import micro_batches
    from kimi_core.trainer.policy import Policy
    from kimi_core.types import Batch

    def micro(lengths: list[int]):
        edges = np.cumsum([0, *lengths]).astype(np.int32)
        blank = np.zeros(edges[-1], np.float32)
        ids = np.random.default_rng(0).integers(vocabulary, size=edges[-1]).astype(np.int32)
        batch = Batch(ids, blank, blank.astype(np.uint8), blank.astype(np.int32), edges)
        wanted = np.ones(edges[-1], bool)
        wanted[edges[:-1]] = False
        (only,) = micro_batches(
            batch, wanted, range(len(lengths)), max_tokens=1 << 30, layout=policy.layout
        )
        return only

    model = _model(shape)
    vocabulary = model.config.vocab_size
    policy = Policy(model, temperature=1.0, head_chunk=256)
    recompute = Recompute(model, memory_gb)
    footprint = recompute.footprint(policy.probe)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    policy.logprobs(micro([300, 200])).sum().backward()
    parts = [tokens] if shape == "long" else [tokens // 2, tokens // 4, tokens // 4]
    given = micro(parts)
    plan = recompute.fit(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts at what is held now.
    before = status("VmRSS")
    policy.logprobs(given).mean().backward()
    print(
        json.dumps(
            {
                "measured": status("VmHWM") - before,
                "planned": footprint.bytes(tokens, plan),
                "layers": plan.layers,
                "chunked": plan.chunked,
            }
        )
    )


def _model(shape: str):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape == "long":
        from kimi_core.models.scratch import scratch_model
        from kimi_core.run.config_file import load_config
        from kimi_core.tasks import retrieve

        given = load_config(Path(__file__).parent.parent / "configs" / "long.toml")
        alphabet = retrieve.alphabet(given.prompts.task.numbers)
        return scratch_model(given.model, alphabet, seed=0)[0]
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        max_position_embeddings=1 << 18,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
