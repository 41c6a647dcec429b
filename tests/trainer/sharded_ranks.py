"""Two ranks of a trainer for ``test_sharded.py``, and the same work in one process."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import SftConfig, TrainerConfig
from kimi_core.models.placement import freeze_below
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks
from kimi_core.trainer.sft import SftPhase
from kimi_core.trainer.trainer import Trainer, TrainingDiverged
from kimi_core.types import Batch, TrainingBatch
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher

VERSION = 3
LENGTHS = [(3, 7), (2, 12), (4, 5), (3, 9), (2, 6), (5, 14), (2, 8), (4, 11)]
"""Tokens of each prompt and response."""


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    tied: bool = False
    objective: str = "omd"
    trainable_layers: int | None = None
    responses: int = len(LENGTHS)
    tokens_per_micro_batch: int = 1000
    memory_gb: float | None = None
    dtype: str = "float32"
    age: int = 1
    """Versions that the tokens' weights lie back; 0: the engine's log-probs are compared."""


CASES = {
    "tied": Case(tied=True),
    "untied": Case(),
    "another objective": Case(tied=True, objective="grpo"),
    "frozen layers": Case(trainable_layers=1),
    "many passes, unequally many": Case(tokens_per_micro_batch=14, responses=7),
    "layers computed twice": Case(tied=True, memory_gb=1e-4),
    "a rank with nothing": Case(responses=1),
    "the engine is far off": Case(age=0, tokens_per_micro_batch=30),
    "bfloat16": Case(dtype="bfloat16"),
}


def tiny_llama(case: Case = CASES["untied"]) -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    freeze_below(model, case.trainable_layers)
    return model.to(getattr(torch, case.dtype)).eval()


def batch_of(responses: int, age: int = 1) -> TrainingBatch:
    """The first responses of ``LENGTHS``."""
    ids, logprobs, masks = [], [], []
    for index, (prompt, response) in enumerate(LENGTHS[:responses]):
        rng = np.random.default_rng(index)
        ids.append(rng.integers(40, size=prompt + response))
        logprobs.append(np.repeat([0.0, -3.0], [prompt, response]))
        masks.append(np.repeat([0, 1], [prompt, response]))
    mask = np.concatenate(masks).astype(np.uint8)
    tokens = Batch(
        token_ids=np.concatenate(ids).astype(np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32),
        mask=mask,
        policy_versions=np.where(mask, VERSION - age, -1).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(len, ids)], dtype=np.int32),
    )
    earned = np.linspace(-1, 1, len(LENGTHS))
    return TrainingBatch(
        tokens=tokens,
        group_ids=np.zeros(responses, np.int64),
        rewards=earned[:responses],
        correctness=earned[:responses],
        advantages=earned[:responses],
        ended_rewards={0: earned},
    )


def trainer_of(case: Case, ranks: Ranks | None, publisher: Publisher | None = None) -> Trainer:
    settings = TrainerConfig(
        objective=case.objective,
        tau=0.3,
        learning_rate=1e-3,
        updates_per_iteration=1,
        grad_clip=1e9,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        memory_gb=case.memory_gb,
    )
    policy = Policy(tiny_llama(case), temperature=0.8, head_chunk=16)
    return Trainer(policy, settings, publisher or InPlace(), ranks)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor
    return full.detach().float().clone()


def gradients(case: Case, ranks: Ranks | None = None) -> dict:
    """Gradients before clipping, what moved, and the metrics that ranks have to agree on."""
    trainer = trainer_of(case, ranks)
    names = list(trainer.policy.trainable())
    before = {name: whole(p) for name, p in trainer._master_weights().masters.items()}
    found = {}

    def keep(optimizer, *_):
        held = optimizer.param_groups[0]["params"]
        found.update({n: whole(p.grad) for n, p in zip(names, held, strict=True)})

    hook = register_optimizer_step_pre_hook(keep)
    batch = batch_of(case.responses, case.age)
    metrics = trainer.train(batch, policy_version=VERSION, seed=(0,))
    hook.remove()
    after = {name: whole(p) for name, p in trainer._master_weights().masters.items()}
    return {
        "gradients": {name: value.tolist() for name, value in found.items()},
        "moved": {name: not torch.equal(after[name], before[name]) for name in names},
        "norm": metrics.grad_norm,
        "loss": metrics.loss,
        "entropy": metrics.entropy,
        "gap": metrics.logprob_gap_mean,
        "recomputed": metrics.reference_recomputed,
        "logprobs": np.nan_to_num(metrics.logprobs, nan=7.0).tolist(),
        "fingerprint": trainer.fingerprint(),
    }


def sft_losses(ranks: Ranks | None = None) -> list[float]:
    losses: list[float] = []
    trainer = trainer_of(CASES["tied"], ranks)
    examples = [
        (np.array([2, n], np.int32), np.array([n, n, 1][: 1 + n % 3], np.int32))
        for n in range(3, 40)
    ]
    config = SftConfig(steps=4, batch_size=5, learning_rate=1e-2)

    def report(_: int, loss: float) -> None:
        losses.append(loss)

    SftPhase(trainer, config, TrainerConfig(), report).fit(examples, 0)
    return losses


def nan_on(broken: int, ranks: Ranks) -> dict:
    """One rank's pass meets a NaN; what each rank says, and after how many seconds."""
    trainer = trainer_of(CASES["untied"], ranks)
    before = {name: whole(p) for name, p in trainer._master_weights().masters.items()}
    batch = batch_of(len(LENGTHS))
    if ranks.rank == broken:
        trainer.policy.model.model.norm.register_forward_hook(lambda *_: _[2] * math.nan)
    started = time.monotonic()
    try:
        trainer.train(batch, policy_version=VERSION, seed=(0,))
        said = ""
    except TrainingDiverged as error:
        said = str(error)
    seconds = time.monotonic() - started
    # The policy may show gathered copies, as the pass was not finished; the masters are shards.
    after = {name: whole(p) for name, p in trainer._weights.masters.items()}
    same = all(torch.equal(after[name], before[name]) for name in before)
    return {"said": said, "seconds": seconds, "same": same}


def publish(case: Case, name: str, tp_size: int, ranks: Ranks) -> dict:
    """Whether the arenas that two ranks fill have the bytes of the whole publication."""
    config = tiny_llama(case).config
    dtype = getattr(torch, name)
    publisher = ArenaPublisher(config, dtype, tp_size=tp_size, ranks=ranks)
    trainer = trainer_of(case, ranks, publisher)
    for version in range(4):  # More versions than slots.
        trainer.publish(version)
    same = []
    if ranks.rank == 0:
        alone = ArenaPublisher(config, dtype, tp_size=tp_size)
        alone.publish(tiny_llama(case).named_parameters(), 3)
        for own, other in zip(publisher.arenas, alone.arenas, strict=True):
            with own.acquire() as found, other.acquire() as expected:
                found.verify()
                same.append(bool(np.array_equal(found.payload, expected.payload)))
                same.append(found.crcs == expected.crcs and found.version == 3)
        alone.close()
    publisher.close()
    return {"same": same}


def states(folder: str, ranks: Ranks) -> dict:
    """Save on two ranks, load on one and on two; and a checkpoint for ``from_pretrained``."""
    case = CASES["tied"]
    trainer, path = trainer_of(case, ranks), Path(folder)
    trainer.train(batch_of(5), policy_version=VERSION, seed=(0,))
    trainer.save(path)
    trainer.save_pretrained(path / "checkpoint")
    expected = {name: whole(p) for name, p in trainer.policy.model.named_parameters()}
    alone, two = trainer_of(case, None), trainer_of(case, ranks)
    alone.load(path)
    two.load(path)
    if ranks.rank == 0:
        (path / "again").mkdir()
        alone.save(path / "again")
        alone.save_pretrained(path / "alone")
    ranks.largest(0)
    two.load(path / "again")
    exported = hf.LlamaForCausalLM.from_pretrained(path / "checkpoint")
    saved = load_file(path / "tensors.safetensors")

    def equal(given) -> bool:
        found = {name: whole(p) for name, p in given}
        return all(torch.equal(found[name], expected[name]) for name in expected)

    return {
        "one rank": equal(alone.policy.model.named_parameters()),
        "two ranks": equal(two.policy.model.named_parameters()),
        "exported": equal(exported.named_parameters()),
        "settings": all(
            (path / "checkpoint" / name).read_text() == (path / "alone" / name).read_text()
            for name in ("config.json", "generation_config.json")
        ),
        "saved": saved.keys() == expected.keys() and equal(saved.items()),
    }


def main() -> None:
    given, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
    store = dist.FileStore(given["rendezvous"], 2)
    store.set_timeout(timedelta(seconds=60))
    ranks = Ranks.meet(store, rank, 2, timeout_s=60)
    work = {name: partial(gradients, case) for name, case in CASES.items()}
    work["sft"] = sft_losses
    work |= {f"nan on {broken}": partial(nan_on, broken) for broken in range(2)}
    for dtype, tp_size in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        work[f"arena {dtype} {tp_size}"] = partial(publish, CASES["untied"], dtype, tp_size)
    work["arena tied"] = partial(publish, CASES["tied"], "bfloat16", 1)
    work["states"] = partial(states, given["folder"])
    found = {}
    for name, do in work.items():
        found[name] = do(ranks=ranks)
        print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
