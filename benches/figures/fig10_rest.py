"""Offline ReST (arXiv 2308.08998): draw a batch, fit one right answer a prompt, and repeat.

    python benches/figures/fig10_rest.py FOLDER MODEL --seed 0 --learning-rate 3e-4 --epochs 4

The settings are those of ``think``. Each of four rounds draws 8 answers to each of 320 training
prompts. The evaluations after the rounds are in ``metrics.jsonl``, as those of a run.
"""

import argparse
import json
import random
from contextlib import closing
from pathlib import Path

from kimi_core.cli.settings import CONFIGS
from kimi_core.config import Config, ShortestConfig
from kimi_core.evaluation.answers import Draw, Responder
from kimi_core.evaluation.record import Record, key_of
from kimi_core.metrics import EvaluationMetrics, to_record
from kimi_core.models.codec import Codec
from kimi_core.models.load import load_model
from kimi_core.models.placement import limit_threads
from kimi_core.prompts.load import load_prompts, split
from kimi_core.run.config_file import load_config
from kimi_core.run.run import evaluate_alone
from kimi_core.trainer.sft import train_sft
from kimi_core.types import Prompt

ROUNDS, PROMPTS, SAMPLES = 4, 320, 8
BATCH = 32


def right_answers(config: Config, number: int, folder: Path) -> list[tuple[Prompt, str]]:
    """A round's prompts that have a right answer, with the first one.

    Raises:
        SystemExit: none of the answers is right.
    """
    everything = load_prompts(config.prompts)
    some, _ = split(everything, config.prompts.held_out, config.prompts.split_seed)
    prompts = random.Random(f"{config.seed} {number}").sample(some, PROMPTS)
    plan = Draw(f"round {number}", SAMPLES, config.rollout.max_response_tokens)
    with (
        closing(Record(folder / f"answers-{number}.jsonl")) as record,
        closing(Responder(config)) as responder,
    ):
        responder.draw(plan, prompts, record)
        found = []
        for prompt in prompts:
            answers = record.answers(plan.name, key_of(prompt))
            right = [one for one in answers if one.is_right and one.end == "stop"]
            found += [(prompt, right[0].text)] if right else []
    if not found:
        raise SystemExit(
            f"Round {number}: none of {PROMPTS * SAMPLES} answers is right, so there is nothing to "
            "fit; give a model that was trained for longer"
        )
    return found


def fit(config: Config, found: list[tuple[Prompt, str]], settings: ShortestConfig, to: Path) -> int:
    """Fine-tune the model on the right answers for some epochs; return the number of steps."""
    model, tokenizer = load_model(config.model)
    limit_threads(model)
    codec = Codec(tokenizer, config.rollout.stop, model)
    examples = [codec.encode_example(prompt.text, text) for prompt, text in found]
    train_sft(model, examples, settings, config.trainer, seed=config.seed)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return settings.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "metrics.jsonl").unlink(missing_ok=True)

    def config_of(model: str) -> Config:
        changes = [f"model.name={model}", f"seed={given.seed}", "sft.data=none"]
        return load_config(CONFIGS / "think.toml", changes)

    def note(found: EvaluationMetrics, number: int) -> None:
        line = to_record(found) | {"kind": "evaluation", "iteration": number}
        with (given.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    model = given.model
    note(evaluate_alone(config_of(model)), 0)
    steps = []
    for number in range(1, ROUNDS + 1):
        found = right_answers(config_of(model), number, given.folder)
        settings = ShortestConfig(
            steps=-(-given.epochs * len(found) // BATCH),
            batch_size=min(BATCH, len(found)),
            learning_rate=given.learning_rate,
        )
        to = given.folder / f"round-{number}"
        steps.append(fit(config_of(model), found, settings, to))
        model = str(to)
        note(evaluate_alone(config_of(model)), number)
        print(f"round {number}: {len(found)} right answers, {steps[-1]} steps", flush=True)
    (given.folder / "summary.json").write_text(json.dumps({"steps": steps}))


if __name__ == "__main__":
    main()
