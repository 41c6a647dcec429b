"""Two judges of one size side by side: a scalar value head and a chain of thought (section 2.3.5).

    python python/train_reward.py                          # both, from random weights, CPU-minutes
    python python/train_reward.py --seeds 0 1 2            # with the spread
    python python/train_reward.py --kind classic --model smollm2-135m --data my.jsonl --save runs/rm

Both see the same labelled examples, as many times: the classic one fits right or wrong with a
binary loss, the other writes out its reasoning and then the verdict in JSON. Prints a JSON line for
each: accuracy and calibration on examples whose problem was in no training example.
`--data` is JSONL as kimi_core/reward/judges/labelled.py describes it; unset, the examples are sums
made from the `multiply` prompts.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--kind", choices=["both", "classic", "judge"], default="both")
parser.add_argument("--model", default="scratch", help="a folder, a hub id, smollm2-135m, scratch")
parser.add_argument("--data", help="JSONL of labelled responses (default: sums from `multiply`)")
parser.add_argument("--examples", type=int, default=6000, help="to train on")
parser.add_argument("--test", type=int, default=600, help="to test on")
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--batch-size", type=int, default=48)
parser.add_argument("--learning-rate", type=float, help="(default: 3e-3 from scratch, else 2e-5)")
parser.add_argument("--layers", type=int, default=3, help="of a model from scratch")
parser.add_argument("--width", type=int, default=96, help="of a model from scratch")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--save", type=Path, help="folder for the models of the last seed")


def run(given: argparse.Namespace) -> None:
    """Train and test what was asked for; prints a JSON line for each."""
    for seed in given.seeds:
        train, test = data(given, seed)
        for kind in ["classic", "judge"] if given.kind == "both" else [given.kind]:
            started = time.process_time()
            scores = (classic if kind == "classic" else judge)(given, train, test, seed)
            cpu_s = round(time.process_time() - started, 1)
            line = {"kind": kind, "model": given.model, "seed": seed, "examples": len(train)}
            print(json.dumps(line | {"steps": given.steps} | scores | {"cpu_s": cpu_s}), flush=True)


def data(given: argparse.Namespace, seed: int) -> tuple[list, list]:
    """Train and test examples that share no problem; the test is the same for every seed."""
    from kimi_core.prompts.load import split
    from kimi_core.reward.judges.labelled import load_labelled, split_labelled, sums
    from kimi_core.tasks import multiply

    if given.data is not None:
        train, test = split_labelled(load_labelled(given.data), given.test, seed=0)
    else:
        train_prompts, held_out = split(multiply.prompts(), given.test, 0)
        train, test = sums(train_prompts, seed=seed), sums(held_out, seed=0)
    if len(train) < given.examples:
        raise ValueError(f"--examples {given.examples}: {len(train)} are left to train on")
    return train[: given.examples], test


def classic(given: argparse.Namespace, train: list, test: list, seed: int) -> dict:
    """A value head on the model, trained with a binary loss."""
    from kimi_core.models.codec import Codec
    from kimi_core.reward.judges.value_model import ValueModel, train_value
    from kimi_core.types import Prompt

    model, tokenizer = load(given, seed)
    codec = Codec(tokenizer, [])
    value_model = ValueModel(model)

    def encode(examples: list) -> list[np.ndarray]:
        return [codec.encode_prompt(Prompt(0, one.prompt(), "")) for one in examples]

    train_value(
        value_model,
        encode(train),
        [one.correct for one in train],
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=rate(given),
        seed=seed,
    )
    probabilities = value_model.probabilities(encode(test))
    if given.save is not None:
        value_model.save(given.save / "classic", tokenizer)
    return scores(probabilities, test)


def judge(given: argparse.Namespace, train: list, test: list, seed: int) -> dict:
    """The model fine-tuned to reason and to end with a verdict; what it says is then parsed."""
    from kimi_core.config import SftConfig, TrainerConfig
    from kimi_core.models.codec import Codec
    from kimi_core.reward.judges.judge import JudgeReward, Verdict
    from kimi_core.reward.judges.labelled import TEMPLATE, VERDICT
    from kimi_core.rollout.torch.engine import TorchEngine
    from kimi_core.trainer.sft import train_sft

    if not all(one.reasoning for one in train):
        raise ValueError("A judge learns from examples with reasoning; --kind classic needs none")
    model, tokenizer = load(given, seed)
    codec = Codec(tokenizer, [])
    examples = [
        codec.encode_example(one.prompt(), one.reasoning + VERDICT[one.correct]) for one in train
    ]
    config = SftConfig(steps=given.steps, batch_size=given.batch_size, learning_rate=rate(given))
    train_sft(model, examples, config, TrainerConfig(), seed=seed)
    reward = JudgeReward(
        TorchEngine(model, batch_rows=256),
        codec,
        context=model.config.get_text_config().max_position_embeddings,
        max_tokens=8 + max(len(response) for _, response in examples),
        template=TEMPLATE,
        escaping=False,
    )
    found = reward.judge_many([(one.question, one.reference, one.response) for one in test])
    judged = {i: v for i, v in enumerate(found) if isinstance(v, Verdict)}
    probabilities = np.array(
        [v.confidence if v.correct else 1 - v.confidence for v in judged.values()]
    )
    if given.save is not None:
        model.save_pretrained(given.save / "judge")
        tokenizer.save_pretrained(given.save / "judge")
    return scores(probabilities, [test[i] for i in judged]) | {
        "no_verdict": len(test) - len(judged)
    }


def scores(probabilities: np.ndarray, examples: list) -> dict:
    """Of the probabilities that examples are right; those without a verdict are not among them."""
    from kimi_core.reward.judges.value_model import brier, expected_calibration_error

    if not examples:
        return {"n": 0, "accuracy": None, "brier": None, "ece": None}
    labels = np.array([one.correct for one in examples], float)
    return {
        "n": len(examples),
        "accuracy": round(float(np.mean((probabilities >= 0.5) == (labels > 0.5))), 4),
        "brier": round(brier(probabilities, labels), 4),
        "ece": round(expected_calibration_error(probabilities, labels), 4),
    }


def load(given: argparse.Namespace, seed: int):
    """The model that both start from; one from scratch has the same weights for both."""
    from kimi_core.config import ModelConfig
    from kimi_core.models.load import limit_threads, load_model
    from kimi_core.reward.judges.labelled import ALPHABET

    settings = ModelConfig(
        name=given.model, scratch={"layers": given.layers, "width": given.width, "context": 128}
    )
    model, tokenizer = load_model(settings, alphabet=ALPHABET, seed=seed)
    limit_threads(model)
    return model, tokenizer


def rate(given: argparse.Namespace) -> float:
    """The learning rate."""
    return given.learning_rate or (3e-3 if given.model == "scratch" else 2e-5)


if __name__ == "__main__":
    try:
        run(parser.parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
