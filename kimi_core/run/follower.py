"""A rank of a trainer that follows rank 0.

    python -m kimi_core.run.follower 127.0.0.1:29400 GENERATION 1

It makes the model without weights, gets its shards from rank 0, and calls what rank 0 calls, until
rank 0 ends the run or is gone. ``trainer/ranks.py`` has the protocol.
"""

import logging
import os
import pickle
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from kimi_core.cluster.placement import TOKEN
from kimi_core.config import Config
from kimi_core.models.placement import device_of, limit_threads
from kimi_core.run.build import publisher_of
from kimi_core.run.launch import use_interface_to
from kimi_core.trainer.blueprint import Blueprint
from kimi_core.trainer.dpo import DpoPhase
from kimi_core.trainer.ranks import Ranks, is_lost
from kimi_core.trainer.sft import SftPhase
from kimi_core.trainer.trainer import LogprobMismatch, Trainer, TrainingDiverged
from kimi_core.weights.broadcast.gate import LOOPBACK, tunnel

MEET_S = 60.0
"""Seconds to connect to rank 0's store."""


def follow(address: str, generation: str, rank: int) -> None:
    """Be rank ``rank`` of the trainer whose rank 0 has its store at ``address``.

    Raises: what a method raises on this rank alone; rank 0 then sees that this process ends.
    """
    host, port = address.rsplit(":", 1)
    use_interface_to(host)
    reached = (host, int(port))
    if token := os.environ.pop(TOKEN, ""):  # Rank 0 is on another host, behind a gate.
        through = tunnel(reached, bytes.fromhex(token), seconds=MEET_S, again=True)
        reached = (LOOPBACK, through)
    server = dist.TCPStore(*reached, timeout=timedelta(seconds=MEET_S))
    store = dist.PrefixStore(generation, server)
    config = _on_own_gpu(Config.model_validate_json(store.get("config")), rank)
    blueprint: Blueprint = pickle.loads(bytes.fromhex(store.get("policy").decode()))
    settings = config.trainer
    policy = blueprint.build(settings)
    model = policy.model
    limit_threads(model, settings.ranks)
    ranks = Ranks.meet(
        store,
        rank,
        settings.ranks,
        timeout_s=settings.ranks_timeout_s,
        copies=settings.context_parallel * settings.tensor_parallel,
    )
    trainer = Trainer(policy, settings, publisher_of(model, config, ranks), ranks)
    targets = {
        "Trainer": trainer,
        "SftPhase": SftPhase(trainer, config.sft, settings),
        "DpoPhase": DpoPhase(trainer, settings),
    }
    try:
        while order := ranks.next_order():
            name, args, kwargs = order
            owner, method = name.split(".")
            getattr(targets[owner], method)(*args, **kwargs)
    except (TrainingDiverged, LogprobMismatch):
        pass  # Rank 0 raises the same, and tells of it.
    finally:
        ranks.close()


def _on_own_gpu(config: Config, rank: int) -> Config:
    if device_of(config.model.device).type == "cpu":
        return config
    number = rank % torch.cuda.device_count()  # Ray shows a process no GPU but its own.
    torch.cuda.set_device(number)
    model = config.model.model_copy(update={"device": f"cuda:{number}"})
    return config.model_copy(update={"model": model})


def main() -> int:
    logging.disable(logging.WARNING)  # Rank 0 warns.
    rank = sys.argv[3]
    try:
        follow(sys.argv[1], sys.argv[2], int(rank))
    except (OSError, ValueError, RuntimeError) as error:
        if type(error) is RuntimeError and not is_lost(error):
            raise  # A fault of the program.
        print(f"rank {rank} of the trainer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
