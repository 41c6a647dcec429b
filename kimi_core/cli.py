"""The ``kimi`` command.

Its exit status is 0 if all went well, 1 if a run had to stop, 2 for bad input, 130 for Ctrl-C and
143 for SIGTERM. Errors that a user can act on are printed in one line, without a traceback.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from kimi_core.config import Config
from kimi_core.help import CHECK, CURATE, EVALUATE, LONG2SHORT, REPLAY, REWARD, SFT, TRAIN, WARMUP
from kimi_core.long2short import METHODS
from kimi_core.run.config_file import load_config

CONFIGS = Path(__file__).parent / "configs"
"""The configs that ship with the package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        return _fail(f"kimi has no command {name!r}; it has {', '.join(COMMANDS)}", 2)
    return COMMANDS[name][0](rest)


def train(arguments: Sequence[str]) -> int:
    parser = config_parser("train", TRAIN)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue runs/NAME from where it stopped, or start it if there is no such run",
    )
    _may_accept_changes(parser)
    parser.add_argument(
        "--from",
        type=int,
        metavar="N",
        dest="back_to",
        help="with --resume: go back to the state of iteration N, and set aside what came after",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")
    given = parser.parse_intermixed_args(arguments)  # Options may stand between settings.
    if given.back_to is not None and not given.resume:
        return _fail("--from goes back within a run: give --resume, too", 2)

    def run(config: Config) -> None:
        from kimi_core.run.dry_run import describe
        from kimi_core.run.run import train as train_run

        if given.dry_run:
            print(describe(config))
        else:
            options = {"accept_changes": given.accept_changes, "back_to": given.back_to}
            done = train_run(config, resume=given.resume, **options)
            print(f"run folder: {done}")

    return with_config(given.arguments, run)


def sft(arguments: Sequence[str]) -> int:
    parser = config_parser("sft", SFT)
    parser.add_argument("--resume", action="store_true", help="continue from the last saved step")
    _may_accept_changes(parser)
    given = parser.parse_intermixed_args(arguments)

    def run(config: Config) -> None:
        from kimi_core.run.run import fine_tune_alone

        options = {"resume": given.resume, "accept_changes": given.accept_changes}
        print(f"checkpoint: {fine_tune_alone(config, **options)}")

    return with_config(given.arguments, run)


def evaluate(arguments: Sequence[str]) -> int:
    parser = config_parser("evaluate", EVALUATE)
    parser.add_argument("--task", choices=["held-out", "humaneval"], default="held-out")
    parser.add_argument(
        "--solutions",
        choices=["canonical", "empty"],
        help="score these instead of a model's (humaneval)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--benchmark", metavar="NAME", help="aime, math-500, gsm8k, mmlu, ...")
    parser.add_argument("--data", type=Path, help="its file or folder (JSONL, JSON or CSV)")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="K", help="answers to each problem (1: greedy)"
    )
    given = parser.parse_intermixed_args(arguments)

    def run(config: Config) -> None:
        if given.benchmark:
            from kimi_core.run.benchmark import run_benchmark

            sizes = {"samples": given.samples, "limit": given.limit}
            found = run_benchmark(config, given.benchmark, given.data, **sizes)
            print(json.dumps({key: value for key, value in found.items() if key != "config"}))
            return
        if given.task == "held-out":
            from kimi_core.run.run import evaluate_alone

            print(json.dumps(asdict(evaluate_alone(config, limit=given.limit))))
            return
        from kimi_core.evaluation.humaneval import evaluate as evaluate_humaneval
        from kimi_core.reward.code.reward import code_reward

        with closing(code_reward(config.reward.sandbox)) as reward:
            found = evaluate_humaneval(config, reward, solutions=given.solutions, limit=given.limit)
        print(json.dumps(found))

    default = "humaneval" if given.task == "humaneval" else "think"
    default = "benchmark" if given.benchmark else default
    return with_config(given.arguments, run, default=default)


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


def long2short(arguments: Sequence[str]) -> int:
    parser = _parser("long2short", LONG2SHORT)
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to override")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--short", nargs="+", metavar="FOLDER", help="models to merge with")
    parser.add_argument("--weights", nargs="+", type=float, help="of the merge, the long one first")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="(the run's seed)")
    parser.add_argument("--out", type=Path, help="folder to write to (RUN/long2short)")
    given = parser.parse_intermixed_args(arguments)
    if not (saved := given.run / "config.toml").is_file():
        return _fail(f"{given.run} is not the folder of a run: it has no config.toml", 2)
    merged = {"short": given.short, "weights": given.weights}
    chosen = [f"long2short.{key}={json.dumps(value)}" for key, value in merged.items() if value]

    def run(config: Config) -> None:
        from kimi_core.run.long2short import long2short as run_long2short

        out = run_long2short(
            given.run, config, methods=given.methods, seeds=given.seeds, out=given.out
        )
        print(f"summary: {out / 'summary.json'}\nplot: {out / 'figure7.png'}")

    return with_config([str(saved), *given.settings, *chosen], run)


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
        return _fail(str(error), 2)
    return 0


def replay(arguments: Sequence[str]) -> int:
    parser = _parser("replay", REPLAY)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--iteration", type=int, required=True, metavar="N")
    given = parser.parse_args(arguments)

    from kimi_core.run.replay import replay as compare

    status = 0
    try:
        for is_equal, line in compare(given.run, given.iteration):
            print(line)
            status = status if is_equal else 1
    except ValueError as error:
        return _fail(str(error), 2)
    print("equal" if status == 0 else "not equal")
    return status


def sandbox(arguments: Sequence[str]) -> int:
    from kimi_core.sandbox.__main__ import main as sandbox_main

    return sandbox_main(list(arguments))


def buffer(arguments: Sequence[str]) -> int:
    from kimi_core.buffer import main as buffer_main

    return buffer_main(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a model by reinforcement learning"),
    "sft": (sft, "supervised fine-tuning alone"),
    "evaluate": (evaluate, "accuracy of a model on held-out prompts or a benchmark"),
    "curate": (curate, "make a training set of prompts, with a report"),
    "warmup": (warmup, "collect long, verified answers for supervised fine-tuning"),
    "long2short": (long2short, "make a trained model answer shorter, by four methods"),
    "check": (check, "check programming problems and their reference solutions"),
    "reward": (reward, "train and compare two reward models"),
    "replay": (replay, "do an iteration of a run again and compare every bit"),
    "sandbox": (sandbox, "run programs in a sandbox, serve it, or check this machine"),
    "buffer": (buffer, "print what a rollout buffer's file holds"),
}


def reward_parser() -> argparse.ArgumentParser:
    """The options of ``kimi reward``."""
    parser = _parser("reward", REWARD)
    parser.add_argument("--kind", choices=["both", "classic", "judge"], default="both")
    parser.add_argument(
        "--model", default="scratch", help="a folder, a hub id, smollm2-135m, scratch"
    )
    parser.add_argument("--data", help="JSONL of labelled responses (default: sums)")
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


def config_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser of at most one config and any overrides, in any order."""
    parser = _parser(name, description)
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG | key=value",
        help=f"a TOML file or one of {', '.join(shipped())}, and settings to override; "
        "key=none unsets a setting",
    )
    return parser


def _may_accept_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume also if prompts or files that the run reads have changed",
    )


def with_config(
    arguments: Sequence[str], run: Callable[[Config], None], *, default: str = "think"
) -> int:
    """Load the config, apply the overrides, call ``run``, and return the exit status."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    try:
        if len(files) > 1:
            raise ValueError(f"One config at a time, not {len(files)}: {', '.join(files)}")
        config = load_config(find_config(files[0] if files else default), overrides)
    except ValueError as error:
        return _fail(str(error), 2)
    # Only now, because torch takes seconds to load: --help and a misspelt key need not wait.
    from kimi_core.reward.base import RewardOutage
    from kimi_core.rollout.engine import EngineFailed
    from kimi_core.run.stop import Stopped
    from kimi_core.trainer.ranks import RankFailed
    from kimi_core.trainer.trainer import LogprobMismatch, TrainingDiverged

    stops = (RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, RankFailed, OSError)
    try:
        run(config)
    except ValueError as error:
        return _fail(str(error), 2)
    except stops as error:
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(
            f"out of memory: {' '.join(str(error).split())[:200] or 'MemoryError'}. Lower "
            "trainer.memory_gb, trainer.tokens_per_micro_batch, trainer.head_chunk or "
            "rollout.batch_rows; --resume takes all of them, and `kimi train --dry-run` names the "
            "memory of a run",
            1,
        )
    except KeyboardInterrupt as error:
        said = str(error) or (
            "interrupted: what was saved is kept; the same command (kimi train and kimi sft: with "
            "--resume) goes on from there"
        )
        print(said, file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 130
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the CPU or of a GPU ran out, however torch says it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def find_config(name: str) -> Path:
    """The file of that name, or else the config of that name that ships with the package.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".toml")
    if stem in shipped():
        return CONFIGS / f"{stem}.toml"
    raise ValueError(
        f"No config file {name}; give the path of a TOML file, or one of {', '.join(shipped())}"
    )


def shipped() -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"kimi {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _overview() -> str:
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: kimi COMMAND ...", "", *lines, "", "kimi COMMAND --help says more of each."]
    )


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
