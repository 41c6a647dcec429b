"""The two reward models of section 2.3.5, trained on the same labelled examples and compared.

The classic one is a value head with a binary loss. The other, the judge, writes out its reasoning
and then its verdict in JSON. ``kimi reward`` runs this.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.config import Config, ModelConfig, PromptsConfig, SftConfig, TrainerConfig
from kimi_core.models.codec import Codec
from kimi_core.models.load import load_model
from kimi_core.models.placement import limit_threads
from kimi_core.models.vision import Images
from kimi_core.models.vision_load import load_images
from kimi_core.prompts.load import split
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.judges.judge import JudgeReward, JudgeVerdict
from kimi_core.reward.judges.labelled import (
    ALPHABET,
    VERDICT,
    Labelled,
    load_labelled,
    split_labelled,
    sums,
)
from kimi_core.reward.judges.value_model import (
    ValueModel,
    brier,
    expected_calibration_error,
    train_value,
)
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.tasks import multiply
from kimi_core.trainer.sft import train_sft
from kimi_core.types import Prompt


def run(given: argparse.Namespace) -> None:
    """Train and test the requested models; print one JSON line for each."""
    for seed in given.seeds:
        train, test = data(given, seed)
        for kind in ["classic", "judge"] if given.kind == "both" else [given.kind]:
            started = time.process_time()
            scores = (classic if kind == "classic" else judge)(given, train, test, seed)
            cpu_s = round(time.process_time() - started, 1)
            line = {"kind": kind, "model": given.model, "seed": seed, "examples": len(train)}
            print(json.dumps(line | {"steps": given.steps} | scores | {"cpu_s": cpu_s}), flush=True)


def data(given: argparse.Namespace, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Training and test examples that share no problem; the test set is the same for every seed."""
    if given.data is not None:
        train, test = split_labelled(load_labelled(given.data), given.test, seed=0)
    else:
        train_prompts, held_out = split(multiply.prompts(), given.test, 0)
        train, test = sums(train_prompts, seed=seed), sums(held_out, seed=0)
    if len(train) < given.examples:
        raise ValueError(f"--examples {given.examples}; at most {len(train)} are left for training")
    return train[: given.examples], test


def classic(
    given: argparse.Namespace, train: list[Labelled], test: list[Labelled], seed: int
) -> dict[str, Any]:
    """A value head on the model, trained with a binary loss."""
    model, tokenizer = load(given, seed)
    images = images_of(model, given)
    codec = Codec(tokenizer, [], model, images)
    value_model = ValueModel(model, images, template=given.template, chat=given.chat)
    train_value(
        value_model,
        value_model.encode(codec, train),
        [one.correct for one in train],
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=rate(given),
        seed=seed,
    )
    probabilities = value_model.probabilities(value_model.encode(codec, test))
    if given.save is not None:
        value_model.save(given.save / "classic", tokenizer)
    return scores(probabilities, test)


def judge(
    given: argparse.Namespace, train: list[Labelled], test: list[Labelled], seed: int
) -> dict[str, Any]:
    """The model fine-tuned to reason and to end with a verdict, which is then parsed."""
    if not all(one.reasoning for one in train):
        raise ValueError(
            "A judge needs examples with reasoning: add `reasoning`, or use --kind classic"
        )
    model, tokenizer = load(given, seed)
    images = images_of(model, given)
    codec = Codec(tokenizer, [], model, images)
    if images is not None:
        images.add(one.asked(given.template) for one in (*train, *test))
    examples = [
        codec.encode_example(asked(given, one), one.reasoning + VERDICT[one.correct])
        for one in train
    ]
    config = SftConfig(steps=given.steps, batch_size=given.batch_size, learning_rate=rate(given))
    train_sft(model, examples, config, TrainerConfig(), seed=seed, images=images)
    reward = JudgeReward(
        TorchEngine(model, batch_rows=256, images=images),
        codec,
        context=model.config.get_text_config().max_position_embeddings,
        max_tokens=8 + max(len(response) for _, response in examples),
        template=given.template,
        escaping=False,
        chat=given.chat,
    )
    found = reward.judge_many(
        [(one.question, one.reference, one.response) for one in test],
        [one.images for one in test],
    )
    judged = {i: v for i, v in enumerate(found) if isinstance(v, JudgeVerdict)}
    probabilities = np.array(
        [v.confidence if v.correct else 1 - v.confidence for v in judged.values()]
    )
    if given.save is not None:
        model.save_pretrained(given.save / "judge")
        tokenizer.save_pretrained(given.save / "judge")
    return scores(probabilities, [test[i] for i in judged]) | {
        "no_verdict": len(test) - len(judged)
    }


def asked(given: argparse.Namespace, one: Labelled) -> Prompt:
    """What a model is asked about an example: text, or with ``--chat`` a user message."""
    [prompt] = chat_prompts([one.asked(given.template)], PromptsConfig(chat=given.chat))
    return prompt


def images_of(model: PreTrainedModel, given: argparse.Namespace) -> Images | None:
    """An empty table for the images of questions; None: the model reads text only."""
    return load_images(model, Config(model={"name": given.model}))


def scores(probabilities: np.ndarray, examples: list[Labelled]) -> dict[str, Any]:
    """How good the probabilities of right answers are; examples without a verdict are left out."""
    if not examples:
        return {"n": 0, "accuracy": None, "brier": None, "ece": None}
    labels = np.array([one.correct for one in examples], float)
    return {
        "n": len(examples),
        "accuracy": round(float(np.mean((probabilities >= 0.5) == (labels > 0.5))), 4),
        "brier": round(brier(probabilities, labels), 4),
        "ece": round(expected_calibration_error(probabilities, labels), 4),
    }


def load(given: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that both kinds start from, with the same weights."""
    settings = ModelConfig(
        name=given.model, scratch={"layers": given.layers, "width": given.width, "context": 128}
    )
    model, tokenizer = load_model(settings, alphabet=ALPHABET, seed=seed)
    limit_threads(model)
    return model, tokenizer


def rate(given: argparse.Namespace) -> float:
    """The learning rate, or its default for the model."""
    return given.learning_rate or (3e-3 if given.model == "scratch" else 2e-5)
