"""Run by torchrun-like spawning in ``test_sharded.py``: FSDP2 around ``Trainer.train`` on gloo."""

import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import transformers as hf
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import TrainerConfig
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch, TrainingBatch
from kimi_core.weights.publish import InPlace

VERSION = 3
LENGTHS = [(3, 7), (2, 12), (4, 5), (3, 9), (2, 6), (5, 14), (2, 8), (4, 11)]
"""Tokens of each prompt and response. Ranks take every other one."""


def tiny_llama(*, tied: bool) -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def batch_of(which: list[int]) -> TrainingBatch:
    """Those responses of ``LENGTHS``, each the same in every process."""
    ids, logprobs, masks = [], [], []
    for index in which:
        rng = np.random.default_rng(index)
        prompt, response = LENGTHS[index]
        ids.append(rng.integers(40, size=prompt + response))
        logprobs.append(np.repeat([0.0, -3.0], [prompt, response]))
        masks.append(np.repeat([0, 1], [prompt, response]))
    lengths = [len(one) for one in ids]
    mask = np.concatenate(masks).astype(np.uint8)
    tokens = Batch(
        token_ids=np.concatenate(ids).astype(np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32),
        mask=mask,
        policy_versions=np.where(mask, VERSION - 1, -1).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
    )
    earned = np.linspace(-1, 1, len(LENGTHS))
    return TrainingBatch(
        tokens=tokens,
        group_ids=np.zeros(len(which), np.int64),
        rewards=earned[which],
        correctness=earned[which],
        advantages=earned[which],
        ended_rewards={0: earned},
    )


def train(which: list[int], *, tied: bool, objective: str, sharded: bool) -> dict[str, list]:
    """Gradients before clipping, and whether each parameter moved, by name."""
    model = tiny_llama(tied=tied)
    settings = TrainerConfig(
        objective=objective, tau=0.3, learning_rate=1e-3, updates_per_iteration=1, grad_clip=1e9
    )
    policy = Policy(model, temperature=0.8, head_chunk=16)
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(policy)

    def whole(tensor):
        return (tensor.full_tensor() if sharded else tensor).detach().clone()

    names = list(policy.trainable())
    before = {name: whole(p) for name, p in policy.trainable().items()}
    gradients = {}

    def keep(optimizer, *_):
        held = optimizer.param_groups[0]["params"]
        gradients.update({n: whole(p.grad) for n, p in zip(names, held, strict=True)})

    with_hook = register_optimizer_step_pre_hook(keep)
    trainer = Trainer(policy, settings, InPlace())
    metrics = trainer.train(batch_of(which), policy_version=VERSION, seed=(0,))
    with_hook.remove()
    moved = {n: not torch.equal(whole(p), before[n]) for n, p in policy.trainable().items()}
    return {
        "gradients": {name: value.tolist() for name, value in gradients.items()},
        "moved": moved,
        "norm": metrics.grad_norm,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    meeting = f"file://{given['rendezvous']}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    mine = list(range(rank, len(LENGTHS), 2))
    found = [
        train(mine, tied=tied, objective=objective, sharded=True)
        for tied, objective in given["cases"]
    ]
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
