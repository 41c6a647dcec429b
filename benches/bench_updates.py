"""An iteration's training phase in the shape of configs/smollm2.toml: groups or responses dealt.

The same batch, 16 prompts of 113 tokens with 8 answers of 3 tokens each, is trained in two updates
with the top 8 layers of SmolLM2-135M. If responses are dealt, as they were until November 2026,
nearly every prompt is computed in both updates.
"""

import time

import numpy as np

from kimi_core.models.load import load_pretrained
from kimi_core.models.placement import freeze_below
from kimi_core.run.config_file import load_config
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.shares import deal
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import PROMPT_VERSION, Batch, TrainingBatch
from kimi_core.weights.publish import InPlace

PROMPTS, SAMPLES, PROMPT, ANSWER = 16, 8, 113, 3
ROUNDS = 3


def deal_responses(group_ids: np.ndarray, updates: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    return deal(np.arange(len(group_ids)), updates, seed)


def make_batch(vocabulary: int) -> TrainingBatch:
    rng = np.random.default_rng(0)
    count = PROMPTS * SAMPLES
    rows = [
        np.concatenate([prompt, rng.integers(vocabulary, size=ANSWER)])
        for prompt in rng.integers(vocabulary, size=(PROMPTS, PROMPT))
        for _ in range(SAMPLES)
    ]
    mask = np.tile(np.repeat([0, 1], [PROMPT, ANSWER]), count).astype(np.uint8)
    rewards = rng.integers(2, size=count).astype(float)
    return TrainingBatch(
        tokens=Batch(
            token_ids=np.concatenate(rows).astype(np.int32),
            logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
            mask=mask,
            policy_versions=np.where(mask, 0, PROMPT_VERSION).astype(np.int32),
            cu_seqlens=np.arange(0, len(mask) + 1, PROMPT + ANSWER, dtype=np.int32),
        ),
        group_ids=np.repeat(np.arange(PROMPTS), SAMPLES),
        rewards=rewards,
        correctness=rewards,
        advantages=rewards - rewards.mean(),
        ended_rewards=dict(enumerate(rewards.reshape(PROMPTS, SAMPLES))),
    )


def test_groups_dealt_against_responses_dealt(ratios, monkeypatch):
    config = load_config("configs/smollm2.toml", ["trainer.logprob_gap_limit=1e9"])
    model = load_pretrained("smollm2-135m", dtype="float32", device="cpu")[0].eval()
    freeze_below(model, config.trainer.trainable_layers)
    policy = Policy(model, temperature=1.0, head_chunk=config.trainer.head_chunk)
    trainer = Trainer(policy, config.trainer, InPlace())
    batch = make_batch(model.config.vocab_size)
    seconds = {"groups": [], "responses": []}
    tokens: dict[str, int] = {}
    for number in range(ROUNDS + 1):
        for name, how in (("groups", deal), ("responses", deal_responses)):
            monkeypatch.setattr("kimi_core.trainer.trainer.deal", how)
            start = time.process_time()
            trainer.train(batch, policy_version=0, seed=(number,))
            if number:  # The first round warms up.
                seconds[name].append(time.process_time() - start)
            shares = how(batch.group_ids, 2, (number,))
            laid = [
                micro.ids_rl.numel()
                for share in shares
                for micro in trainer._micro_batches(batch.tokens, batch.tokens.mask > 0, share)
            ]
            tokens[name] = sum(laid)
    best = {name: min(values) for name, values in seconds.items()}
    detail = ", ".join(f"{n} {best[n]:.2f} CPU-s, {tokens[n]} tokens" for n in best)
    ratio = best["responses"] / best["groups"]
    ratios.record("training phase, smollm2: groups", "responses dealt", ratio, 1.5, detail)
