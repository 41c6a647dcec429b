"""Supervised fine-tuning: it learns, counts the right tokens and repeats itself."""

import math

import numpy as np
import pytest
import torch
from small_llama import VOCAB, llama
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import SftConfig, TrainerConfig
from kimi_core.models.placement import freeze_below
from kimi_core.trainer.sft import pack_examples, train_sft
from kimi_core.trainer.trainer import TrainingDiverged


def example(prompt, response):
    return np.array(prompt, np.int32), np.array(response, np.int32)


COPY_TWICE = [example([2, n], [n, n, 1]) for n in range(3, VOCAB)]


def fit(model, examples, *, seed=0, trainer=None, **settings):
    """Train and return the reported losses."""
    losses = []
    config = SftConfig(**{"steps": 4, "batch_size": 8, "learning_rate": 1e-2, **settings})
    trainer = TrainerConfig(**(trainer or {}))

    def report(step, loss):
        losses.append(loss)
        assert step == len(losses)

    train_sft(model, examples, config, trainer, seed=seed, report=report)
    return losses


def negative_logprobs(model, examples):
    """Of the responses' tokens, through the whole model, one example at a time."""
    values = []
    for prompt, response in examples:
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        rows = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values.append(-rows.gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(values)


def test_loss_falls_from_guessing_to_knowing():
    losses = fit(llama(), COPY_TWICE, steps=60, batch_size=len(COPY_TWICE))
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert losses[-1] < 0.2


def test_loss_is_the_mean_over_the_responses_tokens():
    """Not over examples: a long response counts for more. And it is the loss before the step."""
    examples = [example([2, 5], [7]), example([3], [9, 9, 4, 1, 8, 8])]
    model = llama()
    expected = negative_logprobs(model, examples).mean().item()
    (loss,) = fit(model, examples, steps=1, batch_size=2)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_tokens", [4, 1000])
def test_gradient_is_that_of_the_responses_alone(max_tokens):
    examples = [example([2, 5, 11], [7, 1]), example([3], [9, 4, 1])]
    model = llama()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(negative_logprobs(model, examples).mean(), parameters)
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda *_: seen.extend(parameter.grad.clone() for parameter in parameters)
    )
    settings = {"grad_clip": 1e9, "tokens_per_micro_batch": max_tokens}
    fit(model, examples, steps=1, batch_size=2, trainer=settings)
    handle.remove()
    for got, true in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)


def test_prompt_tokens_are_context_only():
    batch = pack_examples([example([2, 5, 11], [7, 1]), example([3], [9, 4, 1])])
    assert batch.token_ids.tolist() == [2, 5, 11, 7, 1, 3, 9, 4, 1]
    assert batch.mask.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]


def test_the_seed_decides_the_order_and_everything_after_it():
    runs = []
    for seed in (0, 0, 1):
        model = llama()
        torch.manual_seed(len(runs))  # torch's own generator has no say
        losses = fit(model, COPY_TWICE, seed=seed)
        runs.append((losses, torch.cat([value.detach().flatten() for value in model.parameters()])))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_every_example_comes_once_before_any_comes_again():
    # Frozen but for one norm that hardly moves, so that a loss tells which example it was of.
    model = llama()
    freeze_below(model, 1)
    model.model.layers.requires_grad_(False)
    own = [negative_logprobs(model, [one]).mean().item() for one in COPY_TWICE]
    count = len(COPY_TWICE)
    losses = fit(model, COPY_TWICE, steps=2 * count, batch_size=1, learning_rate=1e-9)
    np.testing.assert_allclose(sorted(losses[:count]), sorted(own), rtol=1e-4)
    np.testing.assert_allclose(sorted(losses[count:]), sorted(own), rtol=1e-4)
    assert losses[:count] != losses[count:]  # in another order


def test_a_batch_may_be_larger_than_the_data():
    (loss,) = fit(llama(), COPY_TWICE[:2], steps=1, batch_size=7)
    assert math.isfinite(loss)


def test_frozen_layers_stay_as_they_are():
    model = llama()
    freeze_below(model, 1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fit(model, COPY_TWICE)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name


def test_no_steps_change_nothing():
    model = llama()
    before = model.lm_head.weight.detach().clone()
    assert fit(model, COPY_TWICE, steps=0) == []
    assert torch.equal(model.lm_head.weight, before)


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        fit(llama(), [])


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = llama()
    before = {}

    def break_the_model(step, loss):
        assert step == 1 and math.isfinite(loss)
        model.model.norm.weight.data[0] = torch.inf
        before.update({name: value.detach().clone() for name, value in model.named_parameters()})

    config = SftConfig(steps=4, batch_size=8)
    with pytest.raises(TrainingDiverged, match=r"sft, step 2.*Lower sft\.learning_rate"):
        train_sft(model, COPY_TWICE, config, TrainerConfig(), seed=0, report=break_the_model)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_saved_step_with_the_same_bits(tmp_path, dtype):
    config = SftConfig(steps=7, batch_size=4, learning_rate=1e-2)

    def losses_of(model, **given):
        found = {}
        train_sft(
            model,
            COPY_TWICE,
            config,
            TrainerConfig(weight_decay=0.1),
            seed=0,
            report=found.__setitem__,
            **given,
        )
        return found

    def save_after_3(step, save):
        if step == 3:
            save(tmp_path)

    straight, resumed = llama().to(dtype), llama().to(dtype)
    for model in (straight, resumed):  # Some models have weights that never get a gradient.
        model.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=dtype)))
    losses = losses_of(straight, after_step=save_after_3)
    assert losses_of(resumed, resume=(3, tmp_path)) == {step: losses[step] for step in (4, 5, 6, 7)}
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
