import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf

from kimi_core.weights.layout import Layout


@pytest.fixture
def arena_path(tmp_path: Path) -> Iterator[Path]:
    """Where arenas live: in shared memory, where there is any."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="kimi-test-", dir=shared if shared.is_dir() else tmp_path
    ) as folder:
        yield Path(folder) / "arena"


@pytest.fixture(scope="session")
def tiny() -> hf.LlamaConfig:
    """Two layers, tied embeddings, grouped heads."""
    return hf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.fixture(scope="session")
def layout(tiny: hf.LlamaConfig) -> Layout:
    return Layout.from_config(tiny, dtype="float32")


@pytest.fixture
def model(tiny: hf.LlamaConfig) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny)
