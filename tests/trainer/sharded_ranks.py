"""The ranks of trainers for ``test_sharded.py``, and the same work in one process.

    python sharded_ranks.py RANK FOLDER NAME...

is one of four processes, which do the named work. First they are two trainers of two ranks, which
divide the work of two ranks between them, then one trainer of four ranks. Each process writes what
it found into FOLDER.
"""

import math
import os
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as hf
import vision_testing
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import DpoConfig, LoraConfig, SftConfig, TrainerConfig
from kimi_core.models import scratch
from kimi_core.models.lora import choose_trained, plain_parameters
from kimi_core.models.vision import Images
from kimi_core.trainer.blueprint import Blueprint
from kimi_core.trainer.dpo import DpoPhase
from kimi_core.trainer.fitting import Save
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, is_lost
from kimi_core.trainer.sft import SftPhase
from kimi_core.trainer.trainer import Trainer, TrainingDiverged, TrainingMetrics
from kimi_core.types import Batch, Prompt, TrainingBatch
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher

VERSION = 3
AXES = ("ranks", "replicas", "tensor_parallel", "context_parallel")

LENGTHS = [(3, 7), (2, 12), (4, 5), (3, 9), (2, 6), (5, 14), (2, 8), (4, 11)]
"""Tokens of each prompt and response."""


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    ranks: int = 2
    replicas: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    family: str = "Llama"
    tied: bool = False
    vocabulary: int = 40
    kv_heads: int = 2
    objective: str = "omd"
    trainable_layers: int | None = None
    lora: int = 0
    """Rank of adapters; 0: there are none."""
    responses: int = len(LENGTHS)
    tokens_per_micro_batch: int = 1000
    memory_gb: float | None = None
    dtype: str = "float32"
    age: int = 1
    """Versions that the tokens' weights lie back; 0: the engine's log-probs are compared."""
    images: bool = False
    """Two of three prompts begin with one of two images, which rank 0 alone can read."""


TP, CP = Case(tensor_parallel=2), Case(context_parallel=2)
FOUR = Case(ranks=4)
CASES = {
    "FSDP, tied": Case(tied=True),
    "FSDP": Case(),
    "FSDP, another objective": Case(tied=True, objective="grpo"),
    "FSDP, frozen layers": Case(trainable_layers=1),
    "FSDP, many passes, unequally many": Case(tokens_per_micro_batch=14, responses=7),
    "FSDP, layers computed twice": Case(tied=True, memory_gb=1e-4),
    "FSDP, a rank with nothing": Case(responses=1),
    "FSDP, the engine is far off": Case(age=0, tokens_per_micro_batch=30),
    "FSDP, bfloat16": Case(dtype="bfloat16"),
    "FSDP, adapters": Case(lora=3, tied=True, tokens_per_micro_batch=14, responses=7),
    "FSDP, adapters in one layer, bfloat16": Case(lora=4, trainable_layers=1, dtype="bfloat16"),
    "TP, tied": replace(TP, tied=True),
    "TP, untied, uneven vocabulary": replace(TP, vocabulary=41),
    "TP, frozen layers, many passes": replace(TP, trainable_layers=1, tokens_per_micro_batch=40),
    "TP, bfloat16, another objective": replace(TP, dtype="bfloat16", objective="grpo"),
    "TP, norms of heads": replace(TP, family="Qwen3"),
    "CP, tied": replace(CP, tied=True),
    "CP, layers computed twice": replace(CP, memory_gb=1e-4),
    "CP, frozen layers, many passes": replace(CP, trainable_layers=1, tokens_per_micro_batch=14),
    "CP, one head of keys": replace(CP, kv_heads=1, objective="grpo"),
    "CP, the engine is far off": replace(CP, age=0, responses=3),
    "FSDP, images": Case(images=True),
    "FSDP, images, many passes": Case(images=True, tokens_per_micro_batch=30, responses=7),
    "FSDP, images, a rank without": Case(images=True, responses=2),
    "FSDP, images, a frozen tower": Case(images=True, trainable_layers=1),
    "FSDP, images, bfloat16": Case(images=True, dtype="bfloat16"),
    "HSDP, images": replace(FOUR, replicas=2, images=True, tokens_per_micro_batch=30),
    "HSDP": replace(FOUR, replicas=2, tied=True, tokens_per_micro_batch=14),
    "TP × FSDP, unequal passes": replace(
        FOUR, tensor_parallel=2, tokens_per_micro_batch=23, responses=5
    ),
    "TP × FSDP, two ranks with nothing": replace(FOUR, tensor_parallel=2, tied=True, responses=1),
    "CP × FSDP, unequal passes": replace(
        FOUR, context_parallel=2, tied=True, tokens_per_micro_batch=14, responses=7
    ),
    "CP × FSDP, two ranks with nothing": replace(FOUR, context_parallel=2, responses=1),
    "TP × CP": replace(FOUR, tensor_parallel=2, context_parallel=2, tied=True),
    "TP × replicas": replace(
        FOUR, tensor_parallel=2, replicas=2, vocabulary=41, trainable_layers=1
    ),
    "CP × replicas": replace(FOUR, context_parallel=2, replicas=2, tied=True),
    "CP × replicas, adapters": replace(FOUR, context_parallel=2, replicas=2, lora=3),
}


ARENAS = {
    "arena, float32": (CASES["FSDP"], "float32", 1),
    "arena, bfloat16": (CASES["FSDP"], "bfloat16", 1),
    "arena, engine of two ranks": (CASES["FSDP"], "bfloat16", 2),
    "arena, tied": (CASES["FSDP, tied"], "bfloat16", 1),
    "arena, adapters": (CASES["FSDP, adapters"], "float32", 1),
    "arena, CP × replicas, adapters": (CASES["CP × replicas, adapters"], "bfloat16", 2),
    "arena, TP × replicas": (CASES["TP × replicas"], "float32", 1),
    "arena, images": (CASES["FSDP, images"], "float32", 1),
    "arena, TP × FSDP, engine of two ranks": (CASES["TP × FSDP, unequal passes"], "bfloat16", 2),
}
NANS = {
    "NaN on rank 0": (CASES["FSDP"], 0),
    "NaN on rank 1": (CASES["FSDP"], 1),
    "NaN in a TP group": (TP, 1),
    "NaN in a CP group": (CP, 1),
    "NaN on rank 2 of TP × FSDP": (CASES["TP × FSDP, unequal passes"], 2),
}
OTHERS = {
    *("sft", "sft on four", "sft with images", "sft stops"),
    *("whole parameters", "dpo", "dpo on four"),
}
"""Work that a test without a parameter looks at."""


def tiny_llama(case: Case = CASES["FSDP"]) -> hf.PreTrainedModel:
    config = getattr(hf, f"{case.family}Config")(
        vocab_size=case.vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=case.kv_heads,
        head_dim=8,
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    if case.images:
        model = scratch._causal_lm(config, vision_layers=1)
    else:
        model = getattr(hf, f"{case.family}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.to(getattr(torch, case.dtype)).eval()
    choose_trained(model, what_trains(case), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # 0 would leave A without a gradient.
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def what_trains(case: Case) -> TrainerConfig:
    return TrainerConfig(trainable_layers=case.trainable_layers, lora=LoraConfig(rank=case.lora))


def images_of(case: Case) -> Images | None:
    if not case.images:
        return None
    images = vision_testing.table()
    pictures = tuple(map(vision_testing.picture, range(2)))
    images.add([Prompt(0, "", "", images=pictures)])
    return images


def batch_of(responses: int, age: int = 1, *, images: bool = False) -> TrainingBatch:
    """The first responses of ``LENGTHS``."""
    ids, logprobs, masks = [], [], []
    for index, (prompt, response) in enumerate(LENGTHS[:responses]):
        rng = np.random.default_rng(index)
        ids.append(rng.integers(40, size=prompt + response))
        if images and index % 3 != 1:
            ids[-1] = np.append([-1 - index % 2] * scratch.PLACES, ids[-1])
            prompt += scratch.PLACES
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


def axes_of(case: Case) -> dict[str, int]:
    return {axis: getattr(case, axis) for axis in AXES}


def trainer_of(
    case: Case,
    ranks: Ranks | None,
    publisher: Publisher | None = None,
    ranks_timeout_s: float = 60,
) -> Trainer:
    settings = TrainerConfig(
        objective=case.objective,
        tau=0.3,
        learning_rate=1e-3,
        updates_per_iteration=1,
        grad_clip=1e9,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        memory_gb=case.memory_gb,
        ranks_timeout_s=ranks_timeout_s,
        **(axes_of(case) if ranks else {}),
    )
    policy = Policy(tiny_llama(case), temperature=0.8, head_chunk=16, images=images_of(case))
    if ranks and ranks.rank > 0:
        policy = Blueprint.of(policy).build(what_trains(case))  # Rank 0 sends the weights.
    return Trainer(policy, settings, publisher or InPlace(), ranks)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor
    return full.detach().float().clone()


def train(trainer: Trainer, case: Case, batch: TrainingBatch) -> TrainingMetrics:
    # Nobody follows here: each rank deals the batch by itself, and so needs the images.
    trainer.policy.images = images_of(case)
    return trainer.train(batch, policy_version=VERSION, seed=(0,))


def gradients(case: Case, ranks: Ranks | None = None) -> dict:
    """Gradients before clipping, what moved, and the metrics that ranks have to agree on."""
    trainer = trainer_of(case, ranks)
    names = list(trainer.policy.trainable())
    before = {name: whole(p) for name, p in trainer._master_weights().masters.items()}
    found = {}

    def keep(optimizer, *_):
        held = optimizer.param_groups[0]["params"]
        grads = zip(names, [p.grad for p in held], strict=True)
        found.update({name: whole(grad) for name, grad in grads if grad is not None})

    hook = register_optimizer_step_pre_hook(keep)
    metrics = train(trainer, case, batch_of(case.responses, case.age, images=case.images))
    hook.remove()
    after = {name: whole(p) for name, p in trainer._master_weights().masters.items()}
    return {
        "gradients": found,
        "moved": {name: not torch.equal(after[name], before[name]) for name in names},
        "norm": metrics.grad_norm,
        "loss": metrics.loss,
        "entropy": metrics.entropy,
        "gap": metrics.logprob_gap_mean,
        "recomputed": metrics.reference_recomputed,
        "logprobs": np.nan_to_num(metrics.logprobs, nan=7.0).tolist(),
        "entropies": np.nan_to_num(metrics.entropies, nan=7.0).tolist(),
        "fingerprint": trainer.fingerprint(),
    }


def sft_losses(
    ranks: Ranks | None = None,
    case: Case = CASES["FSDP, tied"],
    resume: tuple[int, Path] | None = None,
    save: tuple[int, Path] | None = None,
) -> list[float]:
    """Of four steps, or of those after ``resume``; ``save`` says after which to save, and where."""
    losses: list[float] = []
    trainer = trainer_of(case, ranks)
    examples = [
        (np.array([2, n], np.int32), np.array([n, n, 1][: 1 + n % 3], np.int32))
        for n in range(3, 40)
    ]
    if case.images:
        place = np.full(scratch.PLACES, -1, np.int32)
        examples = [(np.append(place - n % 2, a), b) for n, (a, b) in enumerate(examples)]
    config = SftConfig(steps=4, batch_size=5, learning_rate=1e-2)

    def report(_: int, loss: float) -> None:
        losses.append(loss)

    def after_step(step: int, write: Save) -> None:
        if save and step == save[0]:
            write(save[1])

    SftPhase(trainer, config, TrainerConfig(), report, after_step, resume).fit(examples, 0)
    return losses


def sft_that_stops(ranks: Ranks) -> int:
    """Rank 0 ends it after the first step; how many steps each rank has taken."""
    taken: list[int] = []

    def stop(*_) -> None:
        raise InterruptedError

    phase = SftPhase(
        trainer_of(CASES["FSDP"], ranks),
        SftConfig(steps=4, batch_size=2),
        TrainerConfig(),
        lambda step, _: taken.append(step),
        stop,
    )
    example = np.array([3, 4], np.int32)
    with pytest.raises(InterruptedError) if ranks.rank == 0 else nullcontext():
        phase.fit([(example, example)], 0)
    return len(taken)


def dpo_losses(ranks: Ranks | None = None, case: Case = CASES["FSDP"]) -> list[float]:
    losses: list[float] = []
    pairs = [
        tuple(np.array([2, 3, *range(2, n)][:cut], np.int32) for cut in (2, n - 2, n))
        for n in range(4, 9)
    ]
    config = DpoConfig(steps=3, batch_size=3, learning_rate=1e-2)
    phase = DpoPhase(trainer_of(case, ranks), TrainerConfig(), lambda _, loss: losses.append(loss))
    phase.fit(pairs, config, 0)
    return losses


def whole_parameters(case: Case, ranks: Ranks) -> int:
    """How many parameters of the whole model a rank still has once its policy is sharded."""
    policy = Policy(tiny_llama(case), temperature=0.8, head_chunk=16)
    whole = [weakref.ref(p) for p in policy.model.parameters()]
    trainer = Trainer(policy, TrainerConfig(**axes_of(case)), InPlace(), ranks)
    trainer.policy.nothing()
    return sum(one() is not None for one in whole)


def nan_on(broken: int, ranks: Ranks, case: Case = CASES["FSDP"]) -> dict:
    """One rank's pass meets a NaN; what each rank says, and after how many seconds."""
    trainer = trainer_of(case, ranks)
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


def late(case: Case, ranks: Ranks) -> float:
    """Rank 0 waits in a pass for rank 1, which does not come; after how many seconds it fails."""
    trainer = trainer_of(case, ranks, ranks_timeout_s=1)
    store = dist.FileStore(os.environ["LATE"], 2)
    store.set_timeout(timedelta(seconds=60))
    started = time.monotonic()
    if ranks.rank == 0:
        with pytest.raises(RuntimeError) as raised:
            trainer.policy.nothing()
        assert is_lost(raised.value)
        store.set("failed", "")
    store.wait(["failed"])
    return time.monotonic() - started


def publish(case: Case, name: str, tp_size: int, ranks: Ranks) -> dict:
    """Whether the arenas that the ranks fill have the bytes of the whole publication."""
    config = tiny_llama(case).config
    dtype = getattr(torch, name)
    publisher = ArenaPublisher(config, dtype, tp_size=tp_size, ranks=ranks)
    trainer = trainer_of(case, ranks, publisher)
    for version in range(4):  # More versions than slots.
        trainer.publish(version)
    same = []
    if ranks.rank == 0:
        alone = ArenaPublisher(config, dtype, tp_size=tp_size)
        alone.publish(plain_parameters(tiny_llama(case)), 3)
        for own, other in zip(publisher.arenas, alone.arenas, strict=True):
            with own.acquire() as found, other.acquire() as expected:
                found.verify()
                same.append(bool(np.array_equal(found.payload, expected.payload)))
                same.append(found.crcs == expected.crcs and found.version == 3)
        alone.close()
    publisher.close()
    return {"same": same}


def states(case: Case, path: Path, ranks: Ranks) -> dict:
    """Save on the ranks, load on one and on all; and a checkpoint for ``from_pretrained``."""
    trainer = trainer_of(case, ranks)
    path.mkdir(exist_ok=True)
    train(trainer, case, batch_of(5, images=case.images))
    trainer.save(path)
    trainer.save_pretrained(path / "checkpoint")
    expected = {name: whole(p) for name, p in plain_parameters(trainer.policy.model)}
    alone, all_ = trainer_of(case, None), trainer_of(case, ranks)
    alone.load(path)
    all_.load(path)
    if ranks.rank == 0:
        (path / "again").mkdir()
        alone.save(path / "again")
        alone.save_pretrained(path / "alone")
    ranks.largest(0)
    all_.load(path / "again")
    exported = type(alone.policy.model).from_pretrained(path / "checkpoint")
    saved = load_file(path / "tensors.safetensors")
    keys = [load_file(path / at / "model.safetensors").keys() for at in ("checkpoint", "alone")]

    def equal(given) -> bool:
        found = {name: whole(p) for name, p in given}
        return all(torch.equal(found[name], expected[name]) for name in expected)

    return {
        "one rank": equal(plain_parameters(alone.policy.model)),
        "all ranks": equal(plain_parameters(all_.policy.model)),
        "exported": equal(exported.named_parameters()),
        "names": keys[0] == keys[1],
        "settings": all(
            (path / "checkpoint" / name).read_text() == (path / "alone" / name).read_text()
            for name in ("config.json", "generation_config.json")
        ),
        "saved": saved.keys() == trainer.policy.trainable().keys()
        and (case.lora > 0 or equal(saved.items())),
    }


def work_of(folder: Path) -> dict[str, tuple[Case, Callable[..., Any]]]:
    """By name: a case, whose axes count, and what its ranks do."""
    work = {name: (case, partial(gradients, case)) for name, case in CASES.items()}
    fsdp, tied, four = CASES["FSDP"], CASES["FSDP, tied"], CASES["TP × FSDP, unequal passes"]
    product = CASES["TP × CP"]
    work["sft"] = fsdp, partial(sft_losses, save=(2, folder / "sft"))
    work["whole parameters"] = fsdp, partial(whole_parameters, fsdp)
    work["sft stops"] = fsdp, sft_that_stops
    work["dpo"] = fsdp, dpo_losses
    for name, (case, broken) in NANS.items():
        work[name] = case, partial(nan_on, broken, case=case)
    for name, (case, dtype, tp_size) in ARENAS.items():
        work[name] = case, partial(publish, case, dtype, tp_size)
    work["states"] = tied, partial(states, tied, folder / "two")
    with_images = CASES["FSDP, images"]
    work["states of images"] = with_images, partial(states, with_images, folder / "images")
    work["sft with images"] = with_images, partial(sft_losses, case=with_images)
    adapted = CASES["FSDP, adapters"]
    work["states of adapters"] = adapted, partial(states, adapted, folder / "adapters")
    work["states of four"] = four, partial(states, four, folder / "four")
    both = CASES["CP × replicas"]
    work["dpo on four"] = both, partial(dpo_losses, case=both)
    again = {"resume": (2, folder / "sft"), "save": (3, folder / "sft of four")}
    work["sft on four"] = product, partial(sft_losses, case=product, **again)
    work["late, FSDP"] = fsdp, partial(late, fsdp)
    work["late, CP"] = CP, partial(late, CP)
    return work


def main() -> None:
    rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    found: dict[str, Any] = {}
    every = {name: one for name, one in work_of(folder).items() if name in names}
    for size in (2, 4):
        world, mine = divmod(rank, size)
        work = [(name, *one) for name, one in every.items() if one[0].ranks == size]
        for number, (name, case, do) in enumerate(work):
            if number % (4 // size) != world:
                continue
            store = dist.FileStore(f"{folder}/store {size} {number}", size)
            store.set_timeout(timedelta(seconds=60))
            os.environ["LATE"] = f"{folder}/late {number}"
            copies = case.tensor_parallel * case.context_parallel
            ranks = Ranks.meet(store, mine, size, timeout_s=60, copies=copies)
            spent, began = time.process_time(), time.monotonic()
            found[name] = do(ranks=ranks)
            dist.destroy_process_group()
            spent, took = time.process_time() - spent, time.monotonic() - began
            print(f"{rank}: {name}, {spent:.2f} CPU-s, {took:.2f} s", file=sys.stderr, flush=True)
    torch.save(found, folder / f"rank {rank}")


if __name__ == "__main__":
    main()
