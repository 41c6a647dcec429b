"""A training step of SmolLM2-135M, all layers, beside the bare matrix products of its weights.

    pytest benches/bench_training_step.py          # about 10 minutes of CPU

A step is what ``Trainer.train`` does with one update: forward and backward passes, clipping, and
AdamW. 2,048 tokens predict one each, in 4 or in 16 sequences. Of every weight, *gemm* computes the
three products with 2,048 rows that no step can do without, in float32 and into memory that exists:
the output, the gradient of the input and the gradient of the weight. The products of attention are
not among them. Both run in turn on one thread.
"""

import numpy as np
import pytest
import torch
from timing import cpu_s
from torch import Tensor, nn
from transformers import PreTrainedModel

from kimi_core.config import TrainerConfig
from kimi_core.models.load import load_pretrained
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import PROMPT_VERSION, Batch, TrainingBatch
from kimi_core.weights.publish import InPlace

TOKENS = 2048
LIMIT = 1.15
ROUNDS = 2


def make_batch(sequences: int, vocabulary: int) -> TrainingBatch:
    """One group of ``sequences`` responses to a prompt of one token, together ``TOKENS`` long."""
    rng = np.random.default_rng(0)
    length = TOKENS // sequences + 1
    mask = np.tile(np.arange(length) > 0, sequences)
    rewards = np.arange(sequences) % 2.0
    return TrainingBatch(
        tokens=Batch(
            token_ids=rng.integers(vocabulary, size=len(mask)).astype(np.int32),
            logprobs=np.where(mask, -8.0, 0.0).astype(np.float32),
            mask=mask.astype(np.uint8),
            policy_versions=np.where(mask, 0, PROMPT_VERSION).astype(np.int32),
            cu_seqlens=np.arange(0, len(mask) + 1, length, dtype=np.int32),
        ),
        group_ids=np.zeros(sequences, np.int64),
        rewards=rewards,
        correctness=rewards,
        advantages=rewards - rewards.mean(),
        ended_rewards={0: rewards},
    )


class Gemms:
    """The products of a model's weights with ``TOKENS`` rows, the head's in chunks of rows."""

    def __init__(self, model: PreTrainedModel, head_chunk: int) -> None:
        head = model.get_output_embeddings()
        body = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        self.work = [(linear.weight.detach(), TOKENS) for linear in body]
        self.work += [(head.weight.detach(), head_chunk)] * (TOKENS // head_chunk)
        self.memory: dict[tuple[str, int, int], Tensor] = {}

    def _ones(self, name: str, rows: int, columns: int) -> Tensor:
        key = (name, rows, columns)
        if key not in self.memory:
            self.memory[key] = torch.ones(rows, columns)
        return self.memory[key]

    @torch.no_grad()
    def run(self) -> None:
        for weight, rows in self.work:
            wide, narrow = weight.shape
            inputs, slope = self._ones("inputs", rows, narrow), self._ones("slope", rows, wide)
            torch.mm(inputs, weight.T, out=self._ones("outputs", rows, wide))
            torch.mm(slope, weight, out=self._ones("inputs' slope", rows, narrow))
            torch.mm(slope.T, inputs, out=self._ones("weight's slope", wide, narrow))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("sequences", [4, 16])
def test_training_step(ratios, sequences):
    model = load_pretrained("smollm2-135m", dtype="float32", device="cpu")[0]
    config = TrainerConfig(
        tokens_per_micro_batch=TOKENS + sequences,
        updates_per_iteration=1,
        learning_rate=1e-6,
        logprob_gap_limit=1e9,
    )
    policy = Policy(model, temperature=1.0, head_chunk=config.head_chunk)
    trainer = Trainer(policy, config, InPlace())
    batch = make_batch(sequences, model.config.vocab_size)
    gemms = Gemms(model, config.head_chunk)
    limit, mine = cpu_s(
        gemms.run,
        lambda: trainer.train(batch, policy_version=0, seed=(0,)),
        rounds=ROUNDS,
    )
    ratios.record(
        f"training step, {sequences} x {TOKENS // sequences} tokens",
        "gemm",
        limit / mine,
        1 / LIMIT,
        f"{mine:.2f} against {limit:.2f} CPU-s, {mine / limit:.3f} x; at most {LIMIT} x",
    )
