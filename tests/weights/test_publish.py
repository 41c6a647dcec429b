"""How versions get to engines: in place, by an arena, and in order."""

import numpy as np
import pytest
import torch

from kimi_core.config import TrainerConfig
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Request, Sampling
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.publish import ArenaPublisher, InPlace, module_to_read

GREEDY = Sampling(temperature=0, seed=0, stop_token_ids=frozenset())
CONTEXT = [Request(0, np.array([3, 5, 8], np.int32), 3, budget=6, remaining=6)]


def tokens(engine) -> list[int]:
    return [int(t) for parts in engine.generate(CONTEXT, GREEDY) for t in parts[0].token_ids]


def perturb(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def trainer_of(model, publisher) -> Trainer:
    policy = Policy(model, temperature=1.0, head_chunk=64)
    return Trainer(policy, TrainerConfig(), publisher)


def test_a_module_to_read_shares_parameters_and_nothing_else(model):
    read = module_to_read(model)
    for (name, own), (_, shared) in zip(
        model.named_parameters(), read.named_parameters(), strict=True
    ):
        assert own is shared, name
    assert read.lm_head.weight is read.model.embed_tokens.weight
    model.train()
    assert not read.training
    read.config._attn_implementation = "eager"
    assert model.config._attn_implementation != "eager"


def test_an_update_in_place_shows_at_once(model):
    engine, trainer = TorchEngine(module_to_read(model), batch_rows=2), trainer_of(model, InPlace())
    before = tokens(engine)
    perturb(model)
    trainer.publish(1)
    engine.serve(1)
    assert engine.policy_version == 1
    assert tokens(engine) == tokens(TorchEngine(model, batch_rows=2)) != before


def test_every_rank_gets_its_arena_and_nothing_is_left(model):
    publisher = ArenaPublisher(model.config, model.dtype, tp_size=2)
    assert publisher.paths == []
    trainer = trainer_of(model, publisher)
    for version in (0, 1):
        perturb(model)
        trainer.publish(version)
        for path in publisher.paths:
            with WeightArena.open(path) as arena, arena.acquire() as lease:
                assert lease.version == version
                assert torch.equal(lease.tensors["model.norm.weight"], model.model.norm.weight)
    assert len(publisher.paths) == 2
    publisher.close()
    publisher.close()
    assert publisher.paths == []


def test_versions_only_grow(model):
    trainer = trainer_of(model, InPlace())
    trainer.publish(4)
    with pytest.raises(ValueError, match="Cannot publish version 4: version 4 was published"):
        trainer.publish(4)
    engine = TorchEngine(module_to_read(model), batch_rows=2, policy_version=4)
    with pytest.raises(ValueError, match="Cannot serve version 3: the engine serves 4"):
        engine.serve(3)
