"""A model in 16 bits learns what float32 learns, and its states keep the float32 masters."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer.test_trainer import data_of, llama, train, trainer_of, weights_of

from kimi_core.config import SftConfig, TrainerConfig
from kimi_core.trainer.master_weights import MasterWeights, _dithered
from kimi_core.trainer.sft import train_sft
from kimi_core.trainer.trainer import PARAMETERS

TINY = {"learning_rate": 1e-6, "logprob_gap_limit": 1e9}


def in_16_bits(dtype=torch.bfloat16):
    return llama().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_add_up_in_the_masters(dtype):
    exact, rounded = in_16_bits(dtype).float(), in_16_bits(dtype)
    start = weights_of(exact)
    data = data_of(exact)
    one, other = trainer_of(exact, **TINY), trainer_of(rounded, **TINY)
    for seed in range(10):
        train(one, data, seed=seed)
        train(other, data, seed=seed)
    masters = other._master_weights().masters
    moved = torch.cat([(p - start[n]).flatten() for n, p in weights_of(exact).items()])
    found = torch.cat([(masters[n].detach() - start[n]).flatten() for n in start])
    assert masters["model.norm.weight"].dtype == torch.float32
    # AdamW's first steps are nearly signs, and a gradient near 0 may have another sign in 16 bits.
    assert torch.nn.functional.cosine_similarity(moved, found, dim=0) > 0.95
    assert float(found.norm()) == pytest.approx(float(moved.norm()), rel=0.05)


def test_a_bfloat16_model_moves_as_far_as_its_masters_on_average():
    model = in_16_bits()
    start = weights_of(model)
    trainer = trainer_of(model, **TINY)
    data = data_of(model)
    for seed in range(20):
        train(trainer, data, seed=seed)
    masters = trainer._master_weights().masters
    name = "model.embed_tokens.weight"
    goal = (masters[name].detach() - start[name].float()).double()
    moved = (weights_of(model)[name].double() - start[name].double()) * goal.sign()
    assert float(moved.mean()) == pytest.approx(float(goal.abs().mean()), rel=0.35)
    assert not torch.equal(weights_of(model)[name], start[name])


def test_rounding_is_exact_on_average_and_the_same_each_time():
    exact = torch.full((200_000,), 1.0 + 0.3 / 128)  # Between 1 and 1 + 1/128.
    rounded = _dithered(exact, 3)
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    assert float((rounded.double() - 1).mean()) * 128 == pytest.approx(0.3, abs=0.01)
    assert torch.equal(rounded, _dithered(exact, 3))
    assert not torch.equal(rounded, _dithered(exact, 4))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 2.0**-126, -(2.0**100)])
def test_what_bfloat16_holds_is_kept(value):
    exact = torch.full((1000,), value)
    assert torch.equal(_dithered(exact, 0), exact.bfloat16())


def test_gradients_of_micro_batches_are_summed_in_float32():
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    weights = MasterWeights({"w": parameter})
    for gradient in [1.0, *[2.0**-9] * 256]:  # In bfloat16, 1 + 2⁻⁹ is 1.
        parameter.grad = torch.full_like(parameter, gradient)
        weights.add_gradients()
    assert parameter.grad is None
    assert weights.masters["w"].grad.item() == 1.5


def test_a_state_keeps_the_masters(tmp_path):
    data = data_of(in_16_bits())
    unbroken, stopped = trainer_of(in_16_bits(), **TINY), trainer_of(in_16_bits(), **TINY)
    for trainer in (unbroken, stopped):
        train(trainer, data)
    stopped.save(tmp_path)
    saved = load_file(tmp_path / PARAMETERS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    resumed = trainer_of(in_16_bits(), **TINY)
    resumed.load(tmp_path)
    for trainer in (unbroken, resumed):
        train(trainer, data, seed=1)
    for name, master in unbroken._master_weights().masters.items():
        assert torch.equal(master, resumed._master_weights().masters[name]), name
    one, other = weights_of(unbroken.policy.model), weights_of(resumed.policy.model)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sft_in_bfloat16_takes_small_steps():
    rng = np.random.default_rng(0)
    examples = [tuple(rng.integers(40, size=n).astype(np.int32) for n in (4, 9)) for _ in range(8)]
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = in_16_bits().to(dtype)
        config = SftConfig(steps=60, batch_size=8, learning_rate=3e-5)
        kept = losses.setdefault(dtype, [])
        train_sft(
            model,
            examples,
            config,
            TrainerConfig(),
            seed=0,
            report=lambda _, loss, kept=kept: kept.append(loss),
        )
    fell = {dtype: kept[0] - kept[-1] for dtype, kept in losses.items()}
    assert fell[torch.float32] > 0.01
    assert fell[torch.bfloat16] == pytest.approx(fell[torch.float32], rel=0.1)
