"""Commands that make, check or inspect data."""

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from kimi_core.cli.help import CHECK, CURATE, REWARD, WARMUP
from kimi_core.cli.parser import fail
from kimi_core.cli.settings import CONFIGS, config_parser, parser_of, with_config
from kimi_core.config import Config


def curate(arguments: Sequence[str]) -> int:
    given = config_parser("curate", CURATE).parse_intermixed_args(arguments)
    files = [one for one in given.arguments if one.endswith(".jsonl") and "=" not in one]
    if not any(one.startswith("prompts.source=") for one in given.arguments):
        files = files or [str(CONFIGS / "problems.jsonl")]
    others = [one for one in given.arguments if one not in files]

    def run(config: Config) -> None:
        from kimi_core.run.curate import curate as make

        print(f"training set: {make(config) / 'curated.jsonl'}")

    sources = [f"prompts.source={file}" for file in files]
    return with_config([*others, *sources], run, default="curate")


def warmup(arguments: Sequence[str]) -> int:
    given = config_parser("warmup", WARMUP).parse_intermixed_args(arguments)

    def run(config: Config) -> None:
        from kimi_core.run.warmup import warm_up

        print(f"examples: {warm_up(config)}")

    return with_config(given.arguments, run)


def check(arguments: Sequence[str]) -> int:
    given = config_parser("check", CHECK).parse_intermixed_args(arguments)

    def run(config: Config) -> None:
        from kimi_core.prompts.load import load_prompts
        from kimi_core.reward.code.check_problems import OUTCOMES, check_problems
        from kimi_core.reward.code.reward import code_reward

        prompts, workers = load_prompts(config.prompts), config.reward.workers
        with closing(code_reward(config.reward.sandbox)) as reward:
            counts = check_problems(prompts, reward, workers=workers, say=print)
        print(json.dumps(counts))
        if unsound := sum(counts[outcome] for outcome in OUTCOMES[2:]):
            raise ValueError(
                f"{unsound} of {len(prompts)} problems cannot be trained on as they are"
            )

    return with_config(given.arguments, run, default="code")


def reward(arguments: Sequence[str]) -> int:
    given = reward_parser().parse_args(arguments)

    from kimi_core.reward.judges.compare import run

    try:
        run(given)
    except ValueError as error:
        return fail(str(error), 2)
    return 0


def reward_parser() -> argparse.ArgumentParser:
    """The options of ``kimi reward``."""
    parser = parser_of("reward", REWARD)
    parser.add_argument("--kind", choices=["both", "classic", "judge"], default="both")
    parser.add_argument(
        "--model", default="scratch", help="a folder, a hub id, smollm2-135m, scratch"
    )
    parser.add_argument(
        "--data", help="JSONL of labelled responses, or the folder of a run (default: sums)"
    )
    parser.add_argument(
        "--template",
        default="{question}{reference}?{response}>",
        help="what the model reads (default: %(default)s)",
    )
    parser.add_argument("--examples", type=int, default=6000, help="to train on")
    parser.add_argument("--test", type=int, default=600, help="examples to test on")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, help="(3e-3 from scratch, else 2e-5)")
    parser.add_argument("--layers", type=int, default=3, help="of a model from scratch")
    parser.add_argument("--width", type=int, default=96, help="of a model from scratch")
    parser.add_argument("--chat", action="store_true", help="ask by the model's chat template")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", type=Path, help="folder for the models of the last seed")
    return parser


def sandbox(arguments: Sequence[str]) -> int:
    from kimi_core.sandbox.__main__ import main as sandbox_main

    return sandbox_main(list(arguments))


def buffer(arguments: Sequence[str]) -> int:
    from kimi_core.buffer import main as buffer_main

    return buffer_main(arguments)
