"""DPO against the formula in plain torch, and what it does to a model."""

import copy
import math

import numpy as np
import pytest
import torch
from small_llama import llama
from torch.nn.functional import logsigmoid
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import DpoConfig, TrainerConfig
from kimi_core.models.placement import freeze_below
from kimi_core.trainer.dpo import dpo_loss, train_dpo
from kimi_core.trainer.trainer import TrainingDiverged


def pair(*parts):
    return tuple(np.array(part, np.int32) for part in parts)


PAIRS = [
    pair([2, 5, 11], [7, 1], [9, 4, 8, 1]),
    pair([3], [9, 4, 1], [4, 4, 4, 4, 4, 4]),
    pair([3, 6, 6, 12], [1], [5, 1]),
]


def summed(model, prompt, response):
    """Through the whole model with its own head, one response at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    rows = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, ids[len(prompt) :, None]).double().sum()


def plain_loss(model, reference, pairs, beta):
    """TRL's `sigmoid` loss, written out: the mean over pairs."""
    losses = []
    for prompt, *both in pairs:
        gains = []
        for response in both:
            with torch.no_grad():
                before = summed(reference, prompt, response)
            gains.append(summed(model, prompt, response) - before)
        losses.append(-logsigmoid(beta * (gains[0] - gains[1])))
    return torch.stack(losses).mean()


def fit(model, pairs, *, trainer=None, seed=0, **settings):
    losses = []
    config = DpoConfig(**{"steps": 4, "batch_size": 3, "learning_rate": 1e-2, **settings})
    report = lambda step, loss: losses.append(loss)  # noqa: E731
    train_dpo(model, pairs, config, TrainerConfig(**(trainer or {})), seed=seed, report=report)
    return losses


def test_loss_and_derivative_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    sums = 30 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    reference = 30 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    sums.requires_grad_(True)
    gain = sums - reference
    expected = -torch.log(1 / (1 + torch.exp(-0.1 * (gain[:, 0] - gain[:, 1]))))
    (slopes,) = torch.autograd.grad(expected.sum(), sums)
    losses, found = dpo_loss(sums.detach(), reference, 0.1)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 9, 1000])
def test_loss_and_gradient_of_a_step_are_those_of_the_whole_pairs(max_tokens):
    """Whatever micro-batches the two responses of a pair are in."""
    model = llama()
    reference, twin = copy.deepcopy(model), None
    seen, expected = [], []

    def compare(optimizer, *_):
        nonlocal twin
        twin = copy.deepcopy(model)
        seen.append([p.grad.clone() for p in model.parameters()])
        with torch.enable_grad():
            loss = plain_loss(twin, reference, PAIRS, 0.3)
            expected.append((loss.item(), torch.autograd.grad(loss, list(twin.parameters()))))

    handle = register_optimizer_step_pre_hook(compare)
    settings = {"grad_clip": 1e9, "tokens_per_micro_batch": max_tokens}
    try:
        losses = fit(model, PAIRS, beta=0.3, steps=3, trainer=settings)
    finally:
        handle.remove()
    for loss, found, (true_loss, true) in zip(losses, seen, expected, strict=True):
        assert loss == pytest.approx(true_loss, abs=1e-5)
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)


def test_chosen_responses_become_likelier_than_rejected_ones():
    model = llama()
    before = copy.deepcopy(model)
    losses = fit(model, PAIRS, steps=20)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # it starts at the reference
    for prompt, chosen, rejected in PAIRS:
        gains = [summed(model, prompt, r) - summed(before, prompt, r) for r in (chosen, rejected)]
        assert gains[0] > gains[1] + 10


def test_masters_of_a_16_bit_model_move_by_less_than_its_precision():
    """At this learning rate no weight would move if the optimizer updated bfloat16."""
    model = llama().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, PAIRS, steps=3, learning_rate=1e-6)
    moved = [(p != old).float().mean() for p, old in zip(model.parameters(), before, strict=True)]
    assert 0 < torch.stack(moved).mean() < 0.1


def test_the_seed_decides_the_order():
    runs = [fit(llama(), PAIRS, batch_size=1, seed=seed) for seed in (0, 0, 5)]
    assert runs[0] == runs[1] != runs[2]


def test_frozen_layers_stay_as_they_are():
    model = llama()
    freeze_below(model, 1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fit(model, PAIRS)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="at least one pair"):
        fit(llama(), [])


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = llama()
    before = {}

    def break_the_model(step, loss):
        model.model.norm.weight.data[0] = torch.inf
        before.update({name: value.detach().clone() for name, value in model.named_parameters()})

    with pytest.raises(TrainingDiverged, match=r"dpo, step 2.*Lower dpo\.learning_rate"):
        train_dpo(model, PAIRS, DpoConfig(steps=3), TrainerConfig(), seed=0, report=break_the_model)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
