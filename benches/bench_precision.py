"""What training in bfloat16 learns, compared with float32.

A tiny Llama trains 20 phases of 2 updates on a good and a bad response to one prompt. The figure is
how far the margin log p(good) − log p(bad) moves. bfloat16 with float32 master weights must move it
as far as float32 does, within 5 %, averaged over seeds. Plain bfloat16, where the optimizer updates
the 16-bit weights themselves, is shown for comparison.

    pytest benches/bench_precision.py
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_core.config import TrainerConfig
from kimi_core.trainer import master_weights
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch, TrainingBatch
from kimi_core.weights.publish import InPlace

RATES = (1e-6, 3e-6, 1e-5, 1e-4)
SEEDS = range(5)
PHASES = 20
PROMPT, LENGTH = 8, 24
SHAPE = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)


def fresh(seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model whose bfloat16 and float32 variants start from the same, representable weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS))
    return model.to(torch.bfloat16).to(dtype).eval()


def responses(seed: int) -> np.ndarray:
    """A good and a bad response to one prompt, int32 ``[2, PROMPT + LENGTH]``."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SHAPE["vocab_size"], (2, PROMPT + LENGTH)).astype(np.int32)
    ids[1, :PROMPT] = ids[0, :PROMPT]
    return ids


@torch.no_grad()
def logprobs(model: LlamaForCausalLM, ids_nl: np.ndarray) -> np.ndarray:
    """Log-probs of the responses' tokens, float32 ``[2, LENGTH]``, computed in float32."""
    exact = fresh(0, torch.float32)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ids = torch.from_numpy(ids_nl).long()
    found = exact(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return found[:, PROMPT - 1 :].numpy()


def margin(model: LlamaForCausalLM, ids_nl: np.ndarray) -> float:
    good, bad = logprobs(model, ids_nl).sum(1)
    return float(good - bad)


def moved(seed: int, rate: float, dtype: torch.dtype) -> float:
    """How far the margin moves in ``PHASES`` phases, in nats."""
    model, ids = fresh(seed, dtype), responses(seed)
    config = TrainerConfig(learning_rate=rate, logprob_gap_limit=1e9)
    policy = Policy(model, temperature=1.0, head_chunk=64)
    trainer = Trainer(policy, config, InPlace())
    start = margin(model, ids)
    mask = np.tile(np.repeat([0, 1], [PROMPT, LENGTH]).astype(np.uint8), 2)
    for phase in range(PHASES):
        values = np.zeros(ids.shape, np.float32)
        values[:, PROMPT:] = logprobs(model, ids)
        tokens = Batch(
            token_ids=ids.reshape(-1),
            logprobs=values.reshape(-1),
            mask=mask,
            policy_versions=np.where(mask, phase, -1).astype(np.int32),
            cu_seqlens=np.array([0, PROMPT + LENGTH, 2 * (PROMPT + LENGTH)], np.int32),
        )
        batch = TrainingBatch(
            tokens=tokens,
            group_ids=np.zeros(2, np.int64),
            rewards=np.array([1.0, 0.0]),
            correctness=np.array([1.0, 0.0]),
            advantages=np.array([0.5, -0.5]),
            ended_rewards={0: np.array([1.0, 0.0])},
        )
        trainer.train(batch, policy_version=phase, seed=(seed, phase))
    return margin(model, ids) - start


@pytest.mark.parametrize("rate", RATES)
def test_margin_in_bfloat16(rate, monkeypatch, ratios):
    exact = np.array([moved(seed, rate, torch.float32) for seed in SEEDS])
    masters = np.array([moved(seed, rate, torch.bfloat16) for seed in SEEDS])
    monkeypatch.setattr(master_weights, "SIXTEEN_BITS", ())
    plain = np.array([moved(seed, rate, torch.bfloat16) for seed in SEEDS])
    share = masters.mean() / exact.mean()
    detail = f"{masters.mean():.4f} of {exact.mean():.4f} nats, without masters {plain.mean():.4f}"
    ratios.record(f"margin at {rate:g}", "float32", min(share, 1 / share), 0.95, detail)
