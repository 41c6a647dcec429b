"""Reward models that see the images of a question."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_testing
from tiny_runs import TINY

from kimi_core.cli.data import reward_parser
from kimi_core.config import RewardConfig
from kimi_core.metrics import read_metrics
from kimi_core.models.codec import Codec
from kimi_core.models.images import reference_of
from kimi_core.models.vision_check import own_logprobs
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.judges import compare
from kimi_core.reward.judges.labelled import (
    ALPHABET,
    VERDICT,
    Labelled,
    load_labelled,
    split_labelled,
)
from kimi_core.reward.judges.value_model import ValueModel, ValueReward, train_value
from kimi_core.reward.load import load_reward
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.types import IMAGE_MARK, Prompt

LIGHT, DARK = (vision_testing.picture(seed) for seed in (1, 2))
TEMPLATE = "{question}{response}"


def of(image, correct: bool, response: str = "1") -> Labelled:
    return Labelled(f"{IMAGE_MARK}=", "1", response, correct, images=(image,))


def value_model() -> tuple[ValueModel, Codec]:
    model, tokenizer = vision_testing.tiny()
    images = vision_testing.table()
    return ValueModel(model, images, template=TEMPLATE), Codec(tokenizer, [], model, images)


def test_the_hidden_state_is_that_of_the_models_own_pass_with_pixels():
    value, codec = value_model()
    examples = [of(LIGHT, True), of(DARK, False, "123"), Labelled("12=", "1", "2", True)]
    texts = value.encode(codec, examples)
    assert [len(np.unique(ids[ids < 0])) for ids in texts] == [1, 1, 0]
    # A head that is a row of the output matrix gives the logit of that row's token.
    weight = value.model.get_output_embeddings().weight
    torch.nn.init.zeros_(value.head.bias)
    value.head.weight.data.copy_(weight[3:4] - weight[4:5])
    found = value(texts).detach().numpy()
    for ids, logit in zip(texts, found, strict=True):
        odds = [own_logprobs(value.model, value.images, np.append(ids, t))[-1] for t in (3, 4)]
        assert logit == pytest.approx(odds[0] - odds[1], abs=1e-4)


def test_it_learns_what_only_the_image_tells_and_becomes_a_reward_function(tmp_path):
    value, codec = value_model()
    examples = [of(image, image is LIGHT) for image in (LIGHT, DARK)] * 8
    train_value(
        value, value.encode(codec, examples), [one.correct for one in examples],
        steps=120, batch_size=8, learning_rate=3e-3, seed=0,
    )  # fmt: skip
    expected = value.probabilities(value.encode(codec, examples[:2]))
    assert expected[0] > 0.9 and expected[1] < 0.1
    value.save(tmp_path, codec._tokenizer)
    reward = load_reward(RewardConfig(function="value", value={"model": str(tmp_path)}))
    assert isinstance(reward, ValueReward)
    for image, probability in zip((LIGHT, DARK), expected, strict=True):
        prompt = Prompt(0, f"{IMAGE_MARK}=", "7", images=(image,))
        assert reward(prompt, "1") == pytest.approx(probability, abs=1e-5)
    with pytest.raises(InfrastructureError, match="Cannot ask the value model"):
        reward(prompt, "a character that the model does not know")
    with pytest.raises(InfrastructureError, match="its context has 128"):
        reward(prompt, "1" * 200)


def test_a_mark_in_a_response_is_not_the_place_of_an_image():
    value, codec = value_model()
    hostile = of(LIGHT, True, f"1{IMAGE_MARK}")
    with pytest.raises(ValueError, match="cannot be tokenized"):
        value.encode(codec, [hostile])  # As any character that this model cannot read.
    front = Labelled("=", "1", IMAGE_MARK, True, images=(LIGHT,))
    assert IMAGE_MARK not in front.prompt() and IMAGE_MARK not in hostile.prompt().partition("=")[2]


def test_a_folder_without_a_head_is_refused(tmp_path):
    vision_testing.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"no value_head.safetensors.*reward\.value\.model"):
        load_reward(RewardConfig(function="value", value={"model": str(tmp_path)}))


def lines_of(examples: list[Labelled]) -> str:
    return "".join(
        json.dumps(vars(one) | {"images": [reference_of(image) for image in one.images]}) + "\n"
        for one in examples
    )


def test_a_file_names_images_and_a_split_tells_them_apart(tmp_path):
    path = tmp_path / "labelled.jsonl"
    examples = [of(image, image is LIGHT, str(n)) for n in range(4) for image in (LIGHT, DARK)]
    path.write_text(lines_of(examples))
    found = load_labelled(path)
    assert [one.images[0].digest for one in found] == [one.images[0].digest for one in examples]
    # The text of the question is the same everywhere.
    sides = split_labelled(found, 1, seed=0)
    digests = [{one.images[0].digest for one in side} for side in sides]
    assert all(digests) and not digests[0] & digests[1]
    path.write_text(json.dumps(vars(of(LIGHT, True)) | {"images": ["missing.png"]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*No image .*missing\.png"):
        load_labelled(path)


def test_both_kinds_are_trained_on_images_by_the_command(tmp_path, capsys):
    vision_testing.save_model(tmp_path / "model", ALPHABET)
    examples = [
        Labelled(f"{n}*2=", str(n), str(n), n % 2 == 0, "0+8=8,0:8=8;", (LIGHT, DARK)[: n % 3])
        for n in range(40)
    ]
    assert all(set(one.reasoning + VERDICT[one.correct]) <= set(ALPHABET) for one in examples)
    (tmp_path / "labelled.jsonl").write_text(lines_of(examples))
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "labelled.jsonl")]
    sizes = ["--examples", "16", "--test", "8", "--steps", "2", "--batch-size", "4"]
    compare.run(reward_parser().parse_args([*given, *sizes, "--save", str(tmp_path / "saved")]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["classic", "judge"]
    reward = ValueReward(tmp_path / "saved" / "classic")
    assert 0 < reward(Prompt(0, "3*2=", "6", images=(LIGHT,)), "6") < 1


def test_a_run_is_labelled_data_and_a_run_is_rewarded_by_what_learned_from_it(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    vision_testing.write_data(tmp_path)
    vision_testing.save_model(tmp_path / "model")
    settings = [
        "model.name=model",
        "prompts.source=pictures.jsonl",
        "sft.data=none",
        "rollout.prompts_per_iteration=6",
    ]
    reward = "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 2)\n"
    Path("reward.py").write_text(reward)
    run = train(load_config("tiny.toml", [*settings, "reward.function=reward.py:reward"]))
    labelled = load_labelled(run)
    assert {one.correct for one in labelled} == {True, False}
    assert {len(one.images) for one in labelled} <= {0, 1, 2} and any(
        one.images for one in labelled
    )
    given = ["--model", str(run / "checkpoint"), "--data", str(run), "--template", TEMPLATE]
    sizes = ["--kind", "classic", "--examples", "8", "--test", "4", "--steps", "2"]
    compare.run(reward_parser().parse_args([*given, *sizes, "--save", "saved"]))
    more = ["name=rewarded", "reward.function=value", "reward.value.model=saved/classic"]
    iterations, _ = read_metrics(
        train(load_config("tiny.toml", [*settings, *more])) / "metrics.jsonl"
    )
    assert all(0 < one.reward_mean < 1 for one in iterations)
