"""Images in vLLM: what it computes is what the trainer computes, before and after an update."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_testing
from tiny_runs import TINY
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)
from vllm_testing import MARKS, SMALL_CACHE, STOP, PublishedEngine, gathered, joined

from kimi_core.config import Config, TrainerConfig
from kimi_core.metrics import read_metrics
from kimi_core.models import scratch
from kimi_core.models.vision_check import own_logprobs
from kimi_core.models.vision_load import load_images
from kimi_core.rollout.engine import EngineFailed
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train as train_run
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch, Prompt, Request, Sampling, TrainingBatch
from kimi_core.weights.publish import InPlace

pytestmark = MARKS

WITH_TORCHVISION = pytest.mark.skipif(
    find_spec("torchvision") is None,
    reason="vLLM's LLaVA and Qwen-VL need torchvision, whose CPU build is not in every index",
)


def llava_processor() -> LlavaProcessor:
    """One of transformers, which resizes and crops, as pretrained models have."""
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": scratch.IMAGE_SIZE},
            crop_size={"height": scratch.IMAGE_SIZE, "width": scratch.IMAGE_SIZE},
        ),
        scratch.character_tokenizer(vision_testing.ALPHABET),
        patch_size=scratch.PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=scratch.PAD,
        num_additional_image_tokens=1,
    )


def loud(model: Any) -> Any:
    """With weights so large that an image shows in the log-probs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def idefics3() -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Its processor puts tokens around an image."""
    tokenizer = scratch.character_tokenizer(vision_testing.ALPHABET)
    around = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *around]})
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 32},
        max_image_size={"longest_edge": 32},
        do_image_splitting=False,
    )
    layers = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Idefics3Config(
        vision_config=dict(image_size=32, patch_size=8, **layers),
        text_config=dict(
            model_type="llama",
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            head_dim=32,
            **layers,
        ),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = loud(Idefics3ForConditionalGeneration(config).eval())
    return model, Idefics3Processor(pictures, tokenizer, image_seq_len=4)


def qwen(folder: str) -> Qwen2_5_VLForConditionalGeneration:
    """With M-RoPE; its processor is written into the folder."""
    tokenizer = scratch.character_tokenizer(vision_testing.ALPHABET)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    sizes = {"patch_size": 8, "merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 48 * 48}
    pictures, videos = Qwen2VLImageProcessorPil(**sizes), Qwen2VLVideoProcessor(**sizes)
    Qwen2_5_VLProcessor(pictures, tokenizer, videos).save_pretrained(folder)
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    layers = dict(hidden_size=64, intermediate_size=64)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            **layers,
            depth=2,
            num_heads=2,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=64,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        text_config=dict(
            **layers,
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
            bos_token_id=None,
            eos_token_id=STOP,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return loud(Qwen2_5_VLForConditionalGeneration(config).eval())


@pytest.fixture(
    scope="module",
    params=[
        "Idefics3",
        pytest.param("scratch", marks=WITH_TORCHVISION),
        pytest.param("LLaVA", marks=WITH_TORCHVISION),
        pytest.param("Qwen2.5-VL", marks=WITH_TORCHVISION),
    ],
)
def engine(request, tmp_path_factory):
    name = str(tmp_path_factory.mktemp("model"))
    if request.param == "Idefics3":
        model, processor = idefics3()
        processor.save_pretrained(name)
    elif request.param == "Qwen2.5-VL":
        model = qwen(name)
    else:
        model, _ = vision_testing.tiny(width=64)  # On a CPU vLLM has no heads of less than 32.
        if request.param == "scratch":
            name = "scratch"
        else:
            llava_processor().save_pretrained(name)
    images = load_images(model, Config(model={"name": name}))
    images.add([Prompt(0, "", "", images=tuple(map(vision_testing.picture, range(4))))])
    engine = PublishedEngine(
        model, batch_rows=16, options=SMALL_CACHE, policy_version=3, images=images
    )
    yield engine
    engine.close()


def sampling_of(engine: PublishedEngine, temperature: float) -> Sampling:
    """The image token ends a response (``models/codec.py``)."""
    return Sampling(temperature, 5, frozenset({STOP, engine.config.image_token_id}))


def requests_of(engine: PublishedEngine, budget: int = 20) -> list[Request]:
    """With one image, two, one twice, and none; two differ only in the image; each twice."""
    first, second, third, fourth = (engine.images.ids_of(number) for number in range(4))
    contexts = [
        [*first, 5, 6, 7],
        [*second, 5, 6, 7],
        [4, *third, 8, *fourth, 9],
        [*first, 3, *first, 4],
        [5, 6, 7],
    ]
    return [
        Request(2 * n + twin, np.array(ids, np.int32), len(ids), budget, 20)
        for n, ids in enumerate(contexts)
        for twin in range(2)
    ]


def assert_own(engine: PublishedEngine, requests, parts, temperature: float) -> None:
    """Log-probs of the model's own forward pass with pixels, to 1e-4."""
    for request in requests:
        tokens, logprobs = joined(parts[request.trajectory_id])
        ids = np.append(request.token_ids, tokens).astype(np.int32)
        expected = own_logprobs(engine.model, engine.images, ids, temperature=temperature)
        np.testing.assert_allclose(logprobs, expected[-len(tokens) :], atol=1e-4)


def train(engine: PublishedEngine) -> None:
    """One step of the trainer on responses to prompts with images."""
    requests = requests_of(engine)
    sampling = sampling_of(engine, 0.8)
    parts = gathered(engine.generate(requests, sampling))
    ids, mask, logprobs = [], [], []
    for request in requests:
        tokens, found = joined(parts[request.trajectory_id])
        ids.append(np.append(request.token_ids, tokens).astype(np.int32))
        mask.append(np.repeat([0, 1], [len(request.token_ids), len(tokens)]))
        logprobs.append(np.append(np.zeros(len(request.token_ids)), found))
    mask = np.concatenate(mask).astype(np.uint8)
    n = len(requests)
    earned = np.linspace(-1, 1, n)
    batch = TrainingBatch(
        tokens=Batch(
            token_ids=np.concatenate(ids),
            logprobs=np.concatenate(logprobs).astype(np.float32),
            mask=mask,
            policy_versions=np.where(mask, engine.policy_version, -1).astype(np.int32),
            cu_seqlens=np.cumsum([0, *map(len, ids)], dtype=np.int32),
        ),
        group_ids=np.zeros(n, np.int64),
        rewards=earned,
        correctness=earned,
        advantages=earned,
        ended_rewards={0: earned},
    )
    policy = Policy(
        engine.model, temperature=sampling.temperature, head_chunk=64, images=engine.images
    )
    trainer = Trainer(policy, TrainerConfig(learning_rate=1e-2), InPlace())
    metrics = trainer.train(batch, policy_version=engine.policy_version, seed=(0,))
    assert metrics.logprob_gap_max < 1e-4


@pytest.mark.parametrize("temperature", [0, 0.8], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_model_before_and_after_a_step_of_the_tower(engine, temperature):
    requests, sampling = requests_of(engine), sampling_of(engine, temperature)
    for _ in range(2):
        parts = gathered(engine.generate(requests, sampling))
        assert_own(engine, requests, parts, sampling.temperature or 1.0)
        named = engine.model.named_parameters()
        tower = [one for name, one in named if "vision" in name or "visual" in name]
        before = [one.detach().clone() for one in tower]
        train(engine)
        moved = [not torch.equal(a, b) for a, b in zip(before, tower, strict=True)]
        assert any(moved)
        engine.publish_and_serve(engine.policy_version + 1)
    parts = gathered(engine.generate(requests, sampling))
    assert_own(engine, requests, parts, sampling.temperature or 1.0)


def test_greedy_tokens_are_those_of_the_embedded_engine_whole_and_cut(engine):
    greedy = sampling_of(engine, 0)
    twin = TorchEngine(
        engine.model, batch_rows=16, policy_version=engine.policy_version, images=engine.images
    )
    expected = gathered(twin.generate(requests_of(engine), greedy))
    whole = gathered(engine.generate(requests_of(engine), greedy))
    cut = gathered(engine.generate(requests_of(engine, budget=7), greedy))
    logprobs = {}
    for request in requests_of(engine):
        tokens, _ = joined(whole[request.trajectory_id])
        assert tokens == joined(expected[request.trajectory_id])[0]
        logprobs[request.trajectory_id] = joined(whole[request.trajectory_id])[1]
        parts = cut[request.trajectory_id]
        if parts[-1].end_reason is None:
            begun, _ = joined(parts)
            ids = np.append(request.token_ids, begun).astype(np.int32)
            more = replace(request, token_ids=ids, remaining=20 - len(begun))
            parts = parts + gathered(engine.generate([more], greedy))[request.trajectory_id]
        assert joined(parts)[0] == tokens
    assert not np.allclose(logprobs[0][0], logprobs[2][0])  # Only the image is another.


def test_an_image_that_vllm_expands_to_other_places_is_told(engine, monkeypatch):
    if engine.images.processor.short is None:
        pytest.skip("The places are handed over, so vLLM expands nothing.")
    ids_of = engine.images.ids_of
    monkeypatch.setattr(engine.images, "ids_of", lambda number: ids_of(number) + ids_of(number))
    request = requests_of(engine)[0]
    ids = np.append(engine.images.ids_of(0), [5, 6]).astype(np.int32)
    other = replace(request, token_ids=ids, prompt_length=len(ids))
    with pytest.raises(EngineFailed, match="its processor does not expand an image"):
        gathered(engine.generate([other], sampling_of(engine, 0)))


def test_a_run_with_images_samples_with_vllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    vision_testing.write_data(tmp_path)
    model, processor = idefics3()
    model.save_pretrained("model")
    processor.save_pretrained("model")
    reward = "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 2)\n"
    Path("reward.py").write_text(reward)
    settings = [
        "model.name=model",
        "prompts.source=pictures.jsonl",
        "sft.data=none",
        "reward.function=reward.py:reward",
        "rollout.engine=vllm",
        f"rollout.vllm.args.kv_cache_memory_bytes={SMALL_CACHE['kv_cache_memory_bytes']}",
        "rollout.token_budget=5",
        "rollout.prompts_per_iteration=6",
        "trainer.learning_rate=1e-3",
        "iterations=3",
    ]
    iterations, _ = read_metrics(train_run(load_config("tiny.toml", settings)) / "metrics.jsonl")
    assert 0 < np.nanmax([one.logprob_gap_max for one in iterations]) < 1e-4
    assert sum(one.trajectories_unfinished for one in iterations) > 0
