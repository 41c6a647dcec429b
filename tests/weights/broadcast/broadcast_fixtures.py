"""Small arenas for the tests of weights between hosts."""

import hashlib
from pathlib import Path

import torch
from transformers import LlamaConfig

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.broadcast.rounds import BroadcastSettings
from kimi_core.weights.layout import Layout

CONFIG = LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QUICK = BroadcastSettings(bucket_bytes=4096, answer_s=20, transfer_s=20)


def make_arena(path: Path, *, tp_rank: int = 0, tp_size: int = 1, dtype: str = "bfloat16"):
    layout = Layout.from_config(CONFIG, dtype=dtype, tp_rank=tp_rank, tp_size=tp_size)
    return WeightArena.create(path, layout)


def weights(version: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model in float32, other ones for each version."""
    draw = torch.Generator().manual_seed(version)
    parts = Layout.from_config(CONFIG, dtype="float32").by_hf_name.values()
    return {part.name: torch.randn(part.whole, generator=draw) for _, part in parts}


def digest(arena: WeightArena) -> tuple[int, str]:
    """The version that is served and a hash of its tensors, every checksum compared."""
    with arena.acquire() as lease:
        lease.verify()
        found = hashlib.sha256()
        for tensor in lease.tensors.values():
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return lease.version, found.hexdigest()


def expected(folder: Path, version: int, **layout) -> tuple[int, str]:
    """The digest of an arena into which the version was published locally."""
    path = folder / f"expected-{version}-{len(list(folder.iterdir()))}"
    with make_arena(path, **layout) as arena:
        arena.publish(weights(version), version=version)
        return digest(arena)
