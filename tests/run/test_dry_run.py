"""--dry-run: the memory it names is what the real parts take."""

import tomllib
from dataclasses import replace

import pytest
import torch
from tiny_runs import SCRATCH

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.models import smollm2
from kimi_core.models.load import load_model
from kimi_core.rollout.torch.kv_cache import KVCache
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.dry_run import describe, estimate
from kimi_core.tasks import multiply
from kimi_core.trainer.master_weights import MasterWeights

SMALL = [
    *SCRATCH,
    "rollout.prompts_per_iteration=2",
    "rollout.samples_per_prompt=3",
    "rollout.max_response_tokens=70",
    "rollout.token_budget=30",
    "prompts.held_out=7100",
]

PROMPTS = multiply.prompts()


def config(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [None, 1])
def test_weights_gradients_and_moments_are_those_of_the_real_model(dtype, layers):
    given = config(f"model.dtype={dtype}", *([f"trainer.trainable_layers={layers}"] * bool(layers)))
    parts = build(given)
    trained = {n: p for n, p in parts.model.named_parameters() if p.requires_grad}
    weights = MasterWeights(trained)
    optimizer = weights.adamw(1e-3, 0.0)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in trained.values()]
    weights.add_gradients()
    own = [m for n, m in weights.masters.items() if m is not trained[n]]
    gradients += [master.grad for master in own]
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]

    memory = estimate(given, parts.model, parts.tokenizer, PROMPTS)

    assert memory.weights == size(list(parts.model.parameters()))
    assert memory.master_weights == size(own)
    assert memory.gradients == size(gradients)
    assert memory.optimizer_moments == size(moments)


def test_the_buffer_is_the_one_that_a_run_makes_and_the_cache_no_larger(monkeypatch):
    sizes = []

    class Recorded(KVCache):
        def begin_decode(self, positions_n):
            super().begin_decode(positions_n)
            sizes.append(size([t for cohort in self.cohorts for t in cohort.tensors()]))

    monkeypatch.setattr("kimi_core.rollout.torch.engine.KVCache", Recorded)
    given = config()
    parts = build(given)
    parts.loop.sampling = replace(parts.loop.sampling, stop_token_ids=frozenset())
    for _ in range(3):
        parts.loop.iterate()

    memory = estimate(given, parts.model, parts.tokenizer, PROMPTS)

    # The estimate has all rows at the greatest length, which those of younger ages have not.
    assert 0.5 * memory.kv_cache < max(sizes) <= memory.kv_cache
    stats = parts.loop.buffer.stats()
    assert memory.buffer == RolloutBuffer.file_bytes(stats.capacity_tokens, stats.max_trajectories)


def test_rows_of_the_cache_are_bounded_by_batch_rows():
    parts = build(config())
    bounded = estimate(config("rollout.batch_rows=9"), parts.model, parts.tokenizer, PROMPTS)
    whole = estimate(config(), parts.model, parts.tokenizer, PROMPTS)
    assert bounded.kv_cache * 2 == whole.kv_cache  # 9 rows of 2 prompts x 3 samples x 3 iterations


def test_the_text_is_toml_that_gives_the_same_config():
    text = describe(config())
    assert Config(**tomllib.loads(text)) == config()
    assert "weights" in text
    assert "total" in text


def test_a_large_buffer_is_named_with_the_space_on_the_disk(tmp_path):
    many = ["rollout.prompts_per_iteration=256", "rollout.samples_per_prompt=8"]
    given = config(*many, f"runs={tmp_path}/not/there")
    parts = build(given)
    most = estimate(given, parts.model, parts.tokenizer, PROMPTS).buffer
    with parts.loop.buffer as buffer:
        assert most == RolloutBuffer.file_bytes(
            buffer.stats().capacity_tokens, buffer.stats().max_trajectories
        )
        assert buffer.stats().pages_allocated == 0
    [line] = [line for line in describe(given).splitlines() if "grows with" in line]
    assert f"to at most {most / 1e6:,.1f} MB if each is as long as allowed; " in line
    assert line.endswith(f" MB are free on the disk of {tmp_path}/not/there.")


def test_a_folder_counts_without_its_weights_being_read(tmp_path):
    given = config()
    model, tokenizer = load_model(given.model, alphabet=multiply.ALPHABET)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    expected = estimate(given, model, tokenizer, PROMPTS)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    text = describe(config(f"model.name={tmp_path}"))

    assert f"{parameters:,} parameters" in text
    assert f"{expected.kv_cache / 1e6:.1f}" in text


def test_a_model_that_is_not_here_is_named_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "cache_folder", lambda: tmp_path)
    text = describe(config("model.name=smollm2-135m"))
    assert "smollm2-135m is not on this machine" in text
    assert "weights" not in text.replace("weights = []", "")  # A setting of long2short.
    assert Config(**tomllib.loads(text)).model.name == "smollm2-135m"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Cannot load the model in"):
        describe(config(f"model.name={tmp_path / 'nowhere'}"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["tracker=wandbb"], "allowed are wandb"),
        (["cluster.listen=here", "cluster.token_file=t"], "is no address"),
        (["cluster.listen=localhost:0", "cluster.token_file=nofile"], "Cannot read the token"),
        (["trainer.objective=omdd"], "omdd"),
    ],
)
def test_what_a_run_would_refuse_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        describe(config(*settings))


def test_vllm_takes_three_versions_of_the_weights_and_the_cache_it_is_given():
    given = config("rollout.engine=vllm")
    model, tokenizer = load_model(given.model, alphabet=multiply.ALPHABET)
    memory = estimate(given, model, tokenizer, PROMPTS)
    assert memory.arena == 3 * memory.weights and memory.kv_cache == 1 << 30
    less = config("rollout.engine=vllm", "rollout.vllm.args.kv_cache_memory_bytes=1000000")
    assert estimate(less, model, tokenizer, PROMPTS).kv_cache == 1_000_000
    assert estimate(config(), model, tokenizer, PROMPTS).arena == 0


def test_vllms_arguments_are_printed_as_they_would_be_read():
    given = config("rollout.engine=vllm", 'rollout.vllm.args={a = 1, "b.c" = [true, "d"], e = {}}')
    printed = tomllib.loads(describe(given))
    assert printed["rollout"]["vllm"]["args"] == {"a": 1, "b.c": [True, "d"], "e": {}}


def test_activations_are_those_of_the_largest_pass_and_fit_the_budget():
    parts = build(config())

    def activations(*overrides: str) -> int:
        return estimate(config(*overrides), parts.model, parts.tokenizer, PROMPTS).activations

    whole = activations()
    assert activations("trainer.tokens_per_micro_batch=1") == pytest.approx(whole / 3, rel=0.01)
    budget = whole / 1e9 / 2
    assert activations(f"trainer.memory_gb={budget}") <= whole / 2
    trainer = parts.loop.trainer
    footprint = trainer.recompute.footprint(trainer.policy.probe)
    longest = max(len(parts.loop.encode(prompt)) for prompt in PROMPTS) + 70
    per_token = footprint.bytes(1000, footprint.plan(1000, 1 << 50)) / 1000
    assert whole == pytest.approx(3 * longest * per_token, rel=0.1)


@pytest.mark.parametrize(
    ("longest", "budget", "iterations", "again"),
    [(64, 16, 4, 1.5), (64, 4, 16, 7.5), (70, 30, 3, 90 / 70)],
)
def test_the_price_of_partial_rollouts_is_named(longest, budget, iterations, again):
    text = describe(
        config(f"rollout.max_response_tokens={longest}", f"rollout.token_budget={budget}")
    )
    assert f"takes {iterations} iterations" in text
    assert f"computes {again:.2f} tokens again" in text
    whole = describe(config(f"rollout.max_response_tokens={longest}", "rollout.token_budget=none"))
    assert "Partial rollouts" not in whole
