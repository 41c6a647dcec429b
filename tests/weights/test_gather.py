"""Weights on a GPU are published with the same bytes as weights on the CPU."""

import pytest

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.layout import Layout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_on_a_gpu_are_cast_there_as_on_the_cpu(arena_path, model, tiny, dtype):
    with WeightArena.create(arena_path, Layout.from_config(tiny, dtype=dtype)) as arena:
        sums = []
        for version, device in enumerate(("cpu", "cuda")):
            arena.publish(model.to(device).named_parameters(), version=version)
            with arena.acquire() as lease:
                sums.append(lease.crcs)
        assert sums[0] == sums[1]
