"""Memory of a prefill beyond the keys and values that it stores.

Two layers of SmolLM2's shape, one thread, float32, a process for each case. The memory is the peak
of the process over what it held before, less the cache, when freed blocks return to the system
(``MALLOC_MMAP_THRESHOLD_``). A context of 32,768 tokens is held against one of 8,192.
"""

import json
import sys
import time
from pathlib import Path

import pytest
from timing import in_a_process, status

GROWTH = 1.3
"""Most memory that four times the tokens may take, as a multiple."""


@pytest.mark.parametrize("window", [0, 1024])
def test_memory_does_not_grow_with_the_context(ratios, window):
    short, long = in_a_process(__file__, 8192, window), in_a_process(__file__, 32768, window)
    ratios.record(
        f"prefill of 32,768 tokens, window {window or 'none'}",
        "memory of 8,192",
        GROWTH * short["bytes"] / long["bytes"],
        1.0,
        f"{short['bytes'] / 1e6:.0f} and {long['bytes'] / 1e6:.0f} MB, {long['cpu_s']:.1f} CPU-s",
    )


def _main(tokens: int, window: int) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from kimi_core.rollout.torch.engine import TorchEngine
    from kimi_core.types import Request, Sampling

    config = MistralConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=1000,
        max_position_embeddings=1 << 18,
        sliding_window=window or None,
    )
    torch.manual_seed(0)
    engine = TorchEngine(AutoModelForCausalLM.from_config(config), batch_rows=1, longest=64)

    def prefill(tokens: int) -> None:
        ids = np.random.default_rng(0).integers(1000, size=tokens).astype(np.int32)
        sampling = Sampling(1.0, seed=0, stop_token_ids=frozenset())
        list(engine.generate([Request(0, ids, tokens, 1, 1)], sampling))

    prefill(64)
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts at what is held now.
    before, start = status("VmRSS"), time.process_time()
    prefill(tokens)
    used = status("VmHWM") - before - tokens * 2 * engine.position_bytes
    print(json.dumps({"bytes": used, "cpu_s": time.process_time() - start}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
