"""Adapters: the trainer has them, and everybody else sees one plain model that agrees."""

import copy
import json
from contextlib import closing
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_llama import VOCAB, llama
from tiny_runs import TINY, make_folder

from kimi_core.config import Config, LoraConfig, TrainerConfig
from kimi_core.metrics import read_metrics
from kimi_core.models import lora
from kimi_core.models.load import load_pretrained
from kimi_core.models.lora import choose_trained, plain_module, plain_parameters, plain_state
from kimi_core.run import state
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.weights.publish import ArenaPublisher, CopyInto

pytest.importorskip("peft")

SETTINGS = [
    "model.name=model",
    "iterations=3",
    "sft.data=multiply",
    "sft.steps=2",
    "trainer.lora.rank=4",
    "trainer.learning_rate=1e-2",
    "reward.function=reward.py:some",
    "evaluation.every=9",
]
REWARD = """
def some(prompt, response):
    return sum(character in "1234" for character in response) / 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    (path / "tiny.toml").write_text(TINY)
    (path / "reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(path)
        make_folder(path / "model")
    return path


@pytest.fixture
def work(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def carry_out(*overrides: str, **options) -> Path:
    config = load_config("tiny.toml", [*SETTINGS, *overrides])
    return train(config, console=Console(file=StringIO()), **options)


def adapted(trainer: TrainerConfig, scale: float = 0.3) -> torch.nn.Module:
    """A small model whose adapters have done something."""
    model = llama()
    choose_trained(model, trainer, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(VOCAB)[None]).logits


def test_the_plain_model_is_the_adapted_one(tmp_path):
    model = adapted(TrainerConfig(lora=LoraConfig(rank=3, alpha=5)))
    plain = plain_module(model)
    assert (logits(plain) - logits(llama())).abs().max() < 1e-6  # Not published yet.
    CopyInto(plain).publish(plain_parameters(model), 1)
    assert (logits(model) - logits(llama())).abs().max() > 0.1
    assert (logits(plain) - logits(model)).abs().max() < 1e-5
    assert dict(plain.named_parameters()).keys() == dict(llama().named_parameters()).keys()
    assert plain_state(model).keys() == llama().state_dict().keys()
    # Merging plainly, in float64.
    layer = model.model.layers[0].mlp.up_proj
    a, b = (layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double())
    wanted = llama().model.layers[0].mlp.up_proj.weight.double() + 5 / 3 * b @ a
    assert (plain.model.layers[0].mlp.up_proj.weight - wanted).abs().max() < 1e-6


def test_publishing_again_and_again_adds_up_no_error():
    model = adapted(TrainerConfig(lora=LoraConfig(rank=2)))
    plain, before = plain_module(model), copy.deepcopy(model.state_dict())
    publisher = CopyInto(plain)
    publisher.publish(plain_parameters(model), 1)
    first = {name: one.clone() for name, one in plain.named_parameters()}
    for version in range(2, 20):
        publisher.publish(plain_parameters(model), version)
    assert all(first[name].equal(one) for name, one in plain.named_parameters())
    assert all(before[name].equal(one) for name, one in model.state_dict().items())


def test_only_what_is_asked_for_is_adapted():
    settings = LoraConfig(rank=2, targets=["q_proj", "down_proj"])
    model = adapted(TrainerConfig(lora=settings, trainable_layers=1))
    trains = [name for name, one in model.named_parameters() if one.requires_grad]
    trained = {name.partition(".lora_")[0] for name in trains}
    assert trained == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    with pytest.raises(ValueError, match=r"qproj.*have down_proj, gate_proj, k_proj"):
        adapted(TrainerConfig(lora=LoraConfig(rank=2, targets=["qproj"])))


def test_a_run_trains_adapters_and_its_engine_agrees(work):
    done = carry_out("name=run")
    iterations, _ = read_metrics(done / "metrics.jsonl")
    assert all(one.logprob_gap_max < 1e-4 for one in iterations)
    assert any(one.grad_norm > 0 for one in iterations)
    saved = load_file(done / "states/000003/tensors.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    assert sum(one.abs().sum() for name, one in saved.items() if "lora_B" in name) > 0
    # The checkpoint has the log-probs of the engine that the last version was published to.
    model, tokenizer = load_pretrained(str(done / "checkpoint"))
    with closing(build(load_config("tiny.toml", [*SETTINGS, "name=run"]))) as parts:
        parts.loop.trainer.load(done / "states/000003")
        parts.loop.start()
        ids = tokenizer.encode("3*214=")
        response = np.array([*ids, 5, 6, 7], np.int32)
        [(_, logprobs)] = parts.loop.trainer.policy.on_sequences([response])
        with torch.no_grad():
            all_of = model(torch.from_numpy(response).long()[None]).logits[0].log_softmax(-1)
        wanted = all_of[:-1].gather(1, torch.from_numpy(response[1:]).long()[:, None])[:, 0]
        assert np.abs(logprobs - wanted.numpy()).max() < 1e-5
        read = parts.loop.engine.model
        assert all(
            value.equal(model.get_parameter(name)) for name, value in read.named_parameters()
        )
    config = json.loads((done / "checkpoint/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.nightly
def test_two_ranks_shard_adapters_and_one_goes_on(work):
    one, two = carry_out("name=one"), carry_out("name=two", "iterations=2", "trainer.ranks=2")
    carry_out("name=two", resume=True)
    (expected, _), (found, _) = (read_metrics(run / "metrics.jsonl") for run in (one, two))
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.tokens_sampled == theirs.tokens_sampled
        assert ours.logprob_gap_max < 1e-4
    for name in ("states/000003/tensors.safetensors", "checkpoint/model.safetensors"):
        ours, theirs = load_file(two / name), load_file(one / name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - theirs[key]).abs().max() < 1e-3 for key in ours)


@pytest.mark.nightly
def test_a_killed_run_ends_with_the_same_bits(work, monkeypatch):
    whole = carry_out("name=whole")
    plain, saves = state.save, []

    def dies(*args):
        plain(*args)
        saves.append(args)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("kimi_core.run.run.state.save", dies)
        with pytest.raises(KeyboardInterrupt):
            carry_out("name=killed")
    killed = carry_out("name=killed", resume=True)
    for name in ("states/000003/tensors.safetensors", "checkpoint/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_an_engine_on_an_arena_reads_the_merged_weights(work):
    config = load_config("tiny.toml", [*SETTINGS, "sft.data=none"])
    model, _ = load_pretrained("model")
    choose_trained(model, config.trainer, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    plain = plain_module(model)
    CopyInto(plain).publish(plain_parameters(model), 1)
    publisher = ArenaPublisher(model.config, model.dtype)
    publisher.publish(plain_parameters(model), 1)
    with closing(publisher), publisher.arenas[0].acquire() as lease:
        found = lease.hf_tensors
        assert all(value.equal(found[name]) for name, value in plain.named_parameters())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=scratch", "trainer.lora.rank=2"], "model.name = 'scratch'"),
        (
            ["trainer.lora.rank=2", "trainer.ranks=2", "trainer.tensor_parallel=2"],
            "no plan for dividing adapters",
        ),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(work, overrides, said):
    with pytest.raises(ValueError, match=said):
        build(load_config("tiny.toml", overrides))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    settings = Config(model={"name": "model"}, trainer={"lora": {"rank": 2}})
    with pytest.raises(ValueError, match=r"pip install 'kimi-core\[lora\]'"):
        lora.check_lora(settings)
