"""What one training phase does to the weights, without an engine: log-probs come from the model."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import transformers as hf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import TrainerConfig
from kimi_core.models.placement import freeze_below
from kimi_core.trainer import objectives
from kimi_core.trainer.activations import Plan
from kimi_core.trainer.objectives import Responses
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import (
    PATIENCE,
    LogprobMismatch,
    Trainer,
    TrainingDiverged,
)
from kimi_core.types import PROMPT_VERSION, Batch, TrainingBatch
from kimi_core.weights.publish import InPlace

VOCAB, VERSION = 40, 5
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
LLAMA = {**SHAPE, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
LENGTHS = [(3, 7), (2, 12), (4, 5), (3, 9), (2, 6), (5, 14)]  # of prompts and responses


def llama(**changes):
    return build(hf.LlamaConfig(**LLAMA, **changes))


def build(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def trainer_of(model, **settings):
    defaults = {"tau": 0.3, "learning_rate": 1e-3, "updates_per_iteration": 1, "grad_clip": 1e9}
    config = TrainerConfig(**{**defaults, **settings})
    policy = Policy(model, temperature=0.8, head_chunk=config.head_chunk)
    return Trainer(policy, config, InPlace())


def data_of(model, *, seed=0, shift=0.0, age=0) -> TrainingBatch:
    """Six responses whose reference is the model's own log-probs plus ``shift``."""
    rng = np.random.default_rng(seed)
    mask = np.concatenate([np.repeat([0, 1], lengths) for lengths in LENGTHS]).astype(np.uint8)
    count = len(LENGTHS)
    batch = Batch(
        token_ids=rng.integers(VOCAB, size=len(mask)).astype(np.int32),
        logprobs=np.zeros(len(mask), np.float32),
        mask=mask,
        policy_versions=np.where(mask, VERSION - age, PROMPT_VERSION).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(sum, LENGTHS)], dtype=np.int32),
    )
    own = trainer_of(model).logprobs(batch, mask > 0, range(count))
    batch = dataclasses.replace(batch, logprobs=np.where(mask, own + shift, 0).astype(np.float32))
    return TrainingBatch(
        tokens=batch,
        group_ids=np.array([7, 7, 7, 9, 9, 9]),
        rewards=rng.normal(size=count),
        correctness=np.array([1.0, 0, 1, 0, 1, 0]),
        advantages=rng.normal(size=count),
        ended_rewards={7: rng.normal(size=4), 9: rng.normal(size=3)},
    )


def train(trainer, data, *, seed=0):
    return trainer.train(data, policy_version=VERSION, seed=(seed,))


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(weights, others):
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture
def steps():
    """The gradients of each optimizer step, as the optimizer was given them."""
    taken = []

    def remember(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        taken.append([p.grad.clone() if p.grad is not None else None for p in parameters])

    handle = register_optimizer_step_pre_hook(remember)
    yield taken
    handle.remove()


def assert_close_gradients(own, others):
    scale = max(value.abs().max() for value in others)
    for got, expected in zip(own, others, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale.item())


@pytest.mark.parametrize("name", ["omd", "reinforce", "grpo", "rest"])
def test_a_step_descends_the_mean_loss_over_the_responses(name, steps):
    model = llama()
    data = data_of(model, shift=0.2)
    settings = {"ablation": {"normalize": "sqrt_length"}, "logprob_gap_limit": 1.0}
    metrics = train(trainer_of(model, objective=name, **settings), data)

    model = llama()  # the weights from before
    edges = data.tokens.cu_seqlens
    logprobs = []
    for start, end, (prompt, _) in zip(edges, edges[1:], LENGTHS, strict=False):
        ids = torch.from_numpy(data.tokens.token_ids[start:end]).long()
        rows = (model(ids[None]).logits[0, prompt - 1 : -1] / 0.8).log_softmax(-1)
        logprobs.append(rows.gather(1, ids[prompt:, None])[:, 0])
    responses = Responses(
        ref_logprobs_t=torch.from_numpy(data.tokens.logprobs[data.tokens.mask > 0]),
        response_t=torch.repeat_interleave(torch.tensor([length for _, length in LENGTHS])),
        groups_n=torch.from_numpy(data.group_ids),
        rewards_n=torch.from_numpy(data.rewards),
        correctness_n=torch.from_numpy(data.correctness),
        advantages_n=torch.from_numpy(data.advantages),
        ended_rewards={g: torch.from_numpy(r) for g, r in data.ended_rewards.items()},
    )
    own = torch.cat(logprobs)
    losses = {
        "omd": lambda: objectives.omd(own, responses, tau=0.3, normalize="sqrt_length"),
        "reinforce": lambda: objectives.reinforce(own, responses, normalize="sqrt_length"),
        "grpo": lambda: objectives.grpo(own, responses),
        "rest": lambda: objectives.rest(own, responses, normalize="sqrt_length"),
    }[name]()
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
    assert metrics.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    norm = math.sqrt(sum(float(value.square().sum()) for value in expected))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert len(steps) == 1
    assert_close_gradients(steps[0], expected)


def test_micro_batches_add_up_to_one_batch(steps):
    whole, parts = llama(), llama()
    data = data_of(whole, shift=0.01)
    train(trainer_of(whole, tokens_per_micro_batch=1000), data)
    train(trainer_of(parts, tokens_per_micro_batch=20), data)
    assert len(steps) == 2
    assert_close_gradients(steps[1], steps[0])
    rows = zip(whole.parameters(), parts.parameters(), steps[0], strict=True)
    for one, other, slope in rows:
        # The first step of Adam goes by the sign; that of a gradient near 0 is rounding.
        clear = slope.abs() > 1e-4
        torch.testing.assert_close(one[clear], other[clear], rtol=0, atol=1e-6)


def test_each_call_starts_with_a_fresh_optimizer(steps):
    model = llama()
    start = weights_of(model)
    data, other = data_of(model), data_of(model, seed=1)
    trainer = trainer_of(model)
    ends = []
    for given in (data, other, data):
        model.load_state_dict(start)
        train(trainer, given)
        ends.append(weights_of(model))
    assert_same(ends[0], ends[2])
    assert not torch.equal(ends[0]["lm_head.weight"], ends[1]["lm_head.weight"])
    # Adam's first step: moments hold this gradient and nothing else.
    for (name, before), slope in zip(start.items(), steps[2], strict=True):
        expected = before - 1e-3 * slope / (slope.abs() + 1e-8)
        torch.testing.assert_close(ends[2][name], expected, rtol=0, atol=1e-6)


def test_every_response_is_in_one_update(steps):
    model = llama()
    data = data_of(model)
    metrics = train(trainer_of(model, updates_per_iteration=4), data)
    assert len(steps) == 4 and math.isfinite(metrics.loss)
    steps.clear()
    train(trainer_of(model, updates_per_iteration=50), data)
    assert len(steps) == len(LENGTHS)  # no step without a response


def test_frozen_layers_compute_each_context_once_an_iteration():
    model = llama()
    freeze_below(model, 1)
    trainer = trainer_of(model, updates_per_iteration=2)
    data = data_of(model)
    train(trainer, data)  # The first pass also measures what a pass keeps.
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args: seen.append(args[0].shape[:2].numel())
    )
    train(trainer, data)
    handle.remove()
    # No two responses share a context, and the last token of each is not computed.
    rows = len(data.tokens.token_ids) - len(LENGTHS)
    assert len(seen) == 2 and rows <= sum(seen) <= 1.1 * rows


def test_weight_decay_and_learning_rate_are_the_configs():
    model = llama()
    before = model.lm_head.weight.detach().clone()
    data = data_of(model)
    quiet = dataclasses.replace(data, advantages=np.zeros(len(LENGTHS)))  # ρ = 0 too: no gradient
    trainer = trainer_of(model, objective="reinforce", learning_rate=0.1, weight_decay=0.5)
    train(trainer, quiet)
    torch.testing.assert_close(model.lm_head.weight.detach(), before * (1 - 0.1 * 0.5))


def with_versions(data, versions) -> TrainingBatch:
    """Every third sampled token from each of ``versions``, in turn."""
    sampled = np.flatnonzero(data.tokens.mask)
    written = data.tokens.policy_versions.copy()
    written[sampled] = np.resize(versions, len(sampled))
    return dataclasses.replace(
        data, tokens=dataclasses.replace(data.tokens, policy_versions=written)
    )


def with_logprobs_moved(data, version) -> TrainingBatch:
    moved = data.tokens.logprobs - 3.0 * (data.tokens.policy_versions == version)
    batch = dataclasses.replace(data.tokens, logprobs=moved.astype(np.float32))
    return dataclasses.replace(data, tokens=batch)


def test_max_staleness_keeps_older_tokens_out_of_the_loss(steps):
    data = with_versions(data_of(llama()), [VERSION, VERSION - 1, VERSION - 2])
    for given in (
        data,
        with_logprobs_moved(data, VERSION - 2),
        with_logprobs_moved(data, VERSION - 1),
    ):
        metrics = train(trainer_of(llama(), max_staleness=1), given)
        assert metrics.max_staleness == 1
        assert metrics.tokens_stale_share == pytest.approx(0.5, abs=0.02)
    plain, too_old, counted = steps
    for one, other in zip(plain, too_old, strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


def test_without_max_staleness_every_token_counts(steps):
    data = with_versions(data_of(llama()), [VERSION, VERSION - 7])
    metrics = train(trainer_of(llama()), data)
    train(trainer_of(llama()), with_logprobs_moved(data, VERSION - 7))
    assert metrics.max_staleness == 7
    assert any(not torch.equal(one, other) for one, other in zip(*steps, strict=True))


def test_nothing_fresh_enough_changes_nothing():
    model = llama()
    before = weights_of(model)
    data = data_of(model, age=3)
    metrics = train(trainer_of(model, max_staleness=2, weight_decay=0.1), data)
    assert (metrics.loss, metrics.grad_norm, metrics.entropy) == (0, 0, 0)
    assert_same(before, weights_of(model))


def test_gradients_are_clipped_and_reported_unclipped(steps):
    model = llama()
    metrics = train(trainer_of(model, grad_clip=0.01), data_of(model))
    norm = math.sqrt(sum(float(value.square().sum()) for value in steps[0]))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert metrics.grad_norm > 1


def little_memory(model, data) -> float:
    """``memory_gb`` that ``data`` fits in one pass, if everything is recomputed."""
    trainer = trainer_of(model)
    footprint = trainer.recompute.footprint(trainer.policy.probe)
    (micro,) = trainer._micro_batches(data.tokens, data.tokens.mask > 0, range(len(data)))
    tokens = micro.ids_rl.numel()
    return 1.01 * footprint.bytes(tokens, Plan(footprint.layers, False)) / 1e9


@pytest.mark.parametrize("little", [False, True])
def test_frozen_layers_stay_as_they_are(little):
    model = llama(tie_word_embeddings=True)
    freeze_below(model, 1)
    before = weights_of(model)
    data = data_of(model)
    memory_gb = little_memory(model, data) if little else None
    train(trainer_of(model, memory_gb=memory_gb), data)
    for name, value in model.named_parameters():
        trained = name.startswith(("model.layers.1.", "model.norm."))
        assert torch.equal(value, before[name]) != trained, name


# Dropout is on by default in GPT-2 (modules) and set in Llama (a number the attention reads).
WITH_DROPOUT = {
    "llama": lambda: llama(attention_dropout=0.5),
    "gpt2": lambda: build(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
}


@pytest.mark.parametrize("make", WITH_DROPOUT.values(), ids=WITH_DROPOUT)
def test_recomputing_changes_no_gradient(make, steps):
    calls, slopes = [], []
    for little in (False, True):
        model = make().train()  # Whoever loads a model may leave it in training mode.
        data = data_of(model)
        memory_gb = little_memory(model, data) if little else None
        trainer = trainer_of(model, memory_gb=memory_gb)
        train(trainer, data_of(model, seed=1))  # measures the footprint
        trainer.policy.model.load_state_dict(make().state_dict())
        steps.clear()
        decoder = model.get_decoder()
        layer = decoder.layers[0] if hasattr(decoder, "layers") else decoder.h[0]
        count = []
        layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        metrics = train(trainer, data)
        calls.append(len(count))
        slopes += steps
        assert metrics.logprob_gap_max < 1e-4  # no dropout
        assert metrics.logprob_gap_over_limit_share == 0.0
        assert not model.training  # as the engine, which may share the model, expects it
    assert calls == [1, 2]  # the second one in the backward pass
    assert_close_gradients(slopes[1], slopes[0])


def test_frozen_layers_are_not_recomputed():
    model = build(hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 3}))
    freeze_below(model, 2)
    calls = {0: 0, 1: 0, 2: 0}
    data = data_of(model)
    trainer = trainer_of(model, memory_gb=1e-9)  # Each response is a micro-batch.
    train(trainer, data_of(model, seed=1))  # measures the footprint
    for number, layer in enumerate(model.model.layers):

        def count(*_, number=number):
            calls[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    train(trainer, data)
    assert calls == {0: 6, 1: 12, 2: 12}


@pytest.mark.parametrize("where", ["advantage", "reference"])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(where):
    model = llama()
    good = data_of(model, age=1)
    bad = dataclasses.replace(good, advantages=good.advantages * np.nan)
    if where == "reference":
        logprobs = np.where(good.tokens.mask, -np.inf, 0).astype(np.float32)
        bad = dataclasses.replace(good, tokens=dataclasses.replace(good.tokens, logprobs=logprobs))
    before = weights_of(model)
    trainer = trainer_of(model)
    with pytest.raises(TrainingDiverged, match=r"the update was not taken.*learning_rate"):
        train(trainer, bad)
    assert_same(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert math.isfinite(train(trainer, good).loss)


def test_the_gap_to_the_engine_is_measured_on_fresh_tokens():
    model = llama()
    data = with_versions(data_of(model), [VERSION, VERSION - 1])
    logprobs = data.tokens.logprobs + 0.02 * (data.tokens.policy_versions == VERSION)
    logprobs -= 9.0 * (data.tokens.policy_versions == VERSION - 1)  # older: may be far away
    logprobs[np.flatnonzero(data.tokens.policy_versions == VERSION)[0]] += 0.1
    moved = dataclasses.replace(data.tokens, logprobs=logprobs.astype(np.float32))
    metrics = train(trainer_of(model), dataclasses.replace(data, tokens=moved))
    fresh = (data.tokens.policy_versions == VERSION).sum()
    assert metrics.logprob_gap_mean == pytest.approx(0.02 + 0.1 / fresh, abs=1e-5)
    assert metrics.logprob_gap_max == pytest.approx(0.12, abs=1e-5)
    assert metrics.logprob_gap_over_limit_share == pytest.approx(1 / fresh)  # The limit is 0.05.
    assert not metrics.reference_recomputed
    counted = data.tokens.mask > 0
    assert metrics.entropy == pytest.approx(-float(logprobs[counted].mean()), rel=1e-5)


def test_a_reference_that_is_off_is_recomputed(steps):
    model = llama()
    right, wrong = data_of(model), data_of(model, shift=1.0)
    assert not train(trainer_of(model), right).reference_recomputed
    metrics = train(trainer_of(llama()), wrong)
    assert metrics.reference_recomputed
    assert metrics.logprob_gap_mean == pytest.approx(1.0, abs=1e-4)
    assert metrics.logprob_gap_over_limit_share == 1.0
    assert len(steps) == 2
    assert_close_gradients(steps[1], steps[0])  # as if the engine had been right


def test_recomputing_leaves_the_reference_of_older_tokens(steps):
    """Nobody can recompute those: the weights that sampled them are gone."""
    data = with_versions(data_of(llama()), [VERSION, VERSION - 1])
    older = with_logprobs_moved(data, VERSION - 1)
    both = with_logprobs_moved(older, VERSION)
    assert not train(trainer_of(llama()), older).reference_recomputed
    assert train(trainer_of(llama()), both).reference_recomputed
    assert_close_gradients(steps[1], steps[0])


def test_a_gap_that_stays_stops_the_run():
    model = llama()
    trainer = trainer_of(model, learning_rate=1e-9)
    right, wrong = data_of(model), data_of(model, shift=1.0)
    for _ in range(PATIENCE - 1):
        assert train(trainer, wrong).reference_recomputed
    train(trainer, right)  # begins the count again
    for _ in range(PATIENCE - 1):
        assert train(trainer, wrong).reference_recomputed
    before = weights_of(model)
    with pytest.raises(LogprobMismatch, match="logprob_gap_limit"):
        train(trainer, wrong)
    assert_same(before, weights_of(model))


def test_a_bfloat16_model_trains():
    model = llama().bfloat16()
    before = weights_of(model)
    trainer = trainer_of(model, learning_rate=1e-2, tau=0.01)
    data = data_of(model)
    first = train(trainer, data)
    assert first.logprob_gap_max < 0.2
    for name, value in model.named_parameters():
        assert value.dtype == torch.bfloat16 and value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name
    # What was better than its siblings became likelier, what was worse less likely.
    after = trainer.logprobs(data.tokens, data.tokens.mask > 0, range(len(LENGTHS)))
    moved = np.nan_to_num(after - data.tokens.logprobs)
    moved = np.add.reduceat(moved, data.tokens.cu_seqlens[:-1])
    assert (moved * data.advantages).sum() > 0


@pytest.mark.parametrize("name", ["omd", "grpo"])
def test_log_probs_that_are_nan_leave_the_weights_alone(name):
    model = llama()
    trainer, data = trainer_of(model, objective=name), data_of(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    before = weights_of(model)
    with pytest.raises(TrainingDiverged, match=r"log-probs are NaN.*the update was not taken"):
        train(trainer, data)
    for key, value in model.named_parameters():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num()) and value.grad is None
    assert not model.training


def test_only_trained_parameters_are_saved_and_they_come_back(tmp_path):
    model, other = llama(), llama()
    for one in (model, other):
        freeze_below(one, 1)
    trainer, twin = trainer_of(model), trainer_of(other)
    train(trainer, data_of(model))
    trainer.save(tmp_path)
    twin.load(tmp_path)
    assert_same(weights_of(model), weights_of(other))
    assert twin.fingerprint() == trainer.fingerprint()
    with pytest.raises(ValueError, match=r"trainer\.trainable_layers"):
        trainer_of(llama()).load(tmp_path)


def test_a_parameter_that_is_replaced_while_training_is_an_error():
    """It would get no update, and nothing else would say so."""
    model = llama()
    trainer, data = trainer_of(model), data_of(model)

    def replace(module, *_):
        module.weight = torch.nn.Parameter(module.weight.detach().clone())

    model.model.norm.register_forward_pre_hook(replace)
    with pytest.raises(RuntimeError, match=r"does not hold the trainable .*model\.norm\.weight"):
        train(trainer, data)


def test_an_objective_of_ones_own_that_gives_one_number_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(logprobs_t, responses):\n    return logprobs_t.mean()\n")
    model = llama()
    with pytest.raises(ValueError, match=r"shape \(\); it must return one loss per response"):
        train(trainer_of(model, objective=f"{file}:mine"), data_of(model))


def entropies_of(model, batch: Batch) -> np.ndarray:
    """Of the model's distribution at each token at temperature 0.8, by its own logits."""
    found = []
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        ids = torch.from_numpy(batch.token_ids[start:end]).long()[None]
        with torch.no_grad():
            logits_tv = model(ids).logits[0, :-1].double() / 0.8
        entropy_t = torch.distributions.Categorical(logits=logits_tv).entropy()
        found += [math.nan, *entropy_t.tolist()]
    return np.array(found)


@pytest.mark.parametrize("objective", ["omd", "grpo"])
def test_the_trainer_reports_the_log_probs_and_entropies_that_it_met(objective):
    model = llama()
    data = data_of(model, shift=0.01)
    entropies = entropies_of(model, data.tokens)
    metrics = train(trainer_of(model, objective=objective), data)
    sampled = data.tokens.mask > 0
    np.testing.assert_allclose(metrics.entropies[sampled], entropies[sampled], rtol=1e-5)
    assert np.isnan(metrics.entropies[~sampled]).all()
    np.testing.assert_allclose(
        metrics.logprobs[sampled], data.tokens.logprobs[sampled] - 0.01, atol=1e-5
    )
    assert np.isnan(metrics.logprobs[~sampled]).all()
