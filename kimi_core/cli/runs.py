"""Commands that train, evaluate, repeat or publish a run."""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from kimi_core.cli.help import ENGINE, EVALUATE, LONG2SHORT, PUSH, REPLAY, SFT, TRAIN, WORKER
from kimi_core.cli.parser import fail
from kimi_core.cli.settings import config_parser, may_accept_changes, parser_of, with_config
from kimi_core.config import Config
from kimi_core.long2short import METHODS
from kimi_core.metrics import to_record


def train(arguments: Sequence[str]) -> int:
    parser = config_parser("train", TRAIN)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue runs/NAME from where it stopped, or start it if there is no such run",
    )
    may_accept_changes(parser)
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
        return fail("--from goes back within a run: give --resume, too", 2)

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
    may_accept_changes(parser)
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

            found = to_record(evaluate_alone(config, limit=given.limit))
            print(json.dumps(found, allow_nan=False))
            return
        from kimi_core.evaluation.humaneval import evaluate as evaluate_humaneval
        from kimi_core.reward.code.reward import code_reward

        with closing(code_reward(config.reward.sandbox)) as reward:
            found = evaluate_humaneval(config, reward, solutions=given.solutions, limit=given.limit)
        print(json.dumps(found))

    default = "humaneval" if given.task == "humaneval" else "think"
    default = "benchmark" if given.benchmark else default
    return with_config(given.arguments, run, default=default)


def long2short(arguments: Sequence[str]) -> int:
    parser = parser_of("long2short", LONG2SHORT)
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="key=value", help="settings to override"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--short", nargs="+", metavar="FOLDER", help="models to merge with")
    parser.add_argument("--weights", nargs="+", type=float, help="of the merge, the long one first")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="(the run's seed)")
    parser.add_argument("--out", type=Path, help="folder to write to (RUN/long2short)")
    given = parser.parse_intermixed_args(arguments)

    from kimi_core.run.files import check_run

    try:
        check_run(given.run)
    except ValueError as error:
        return fail(str(error), 2)
    merged = {"short": given.short, "weights": given.weights}
    chosen = [f"long2short.{key}={json.dumps(value)}" for key, value in merged.items() if value]

    def run(config: Config) -> None:
        from kimi_core.run.long2short import long2short as run_long2short

        out = run_long2short(
            given.run, config, methods=given.methods, seeds=given.seeds, out=given.out
        )
        print(f"summary: {out / 'summary.json'}\nplot: {out / 'figure7.png'}")

    return with_config([str(given.run / "config.toml"), *given.settings, *chosen], run)


def replay(arguments: Sequence[str]) -> int:
    parser = parser_of("replay", REPLAY)
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
        return fail(str(error), 2)
    print("equal" if status == 0 else "not equal")
    return status


def push(arguments: Sequence[str]) -> int:
    parser = parser_of("push", PUSH)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="of the repository on the hub")
    parser.add_argument("--best", action="store_true", help="RUN/best, not RUN/checkpoint")
    parser.add_argument("--public", action="store_true", help="a new repository is for everybody")
    given = parser.parse_intermixed_args(arguments)

    from kimi_core.run.push import push as upload

    try:
        print(upload(given.run, given.repo, best=given.best, public=given.public))
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(str(error), 1)
    return 0


def engine(arguments: Sequence[str]) -> int:
    parser = config_parser("engine", ENGINE)
    parser.add_argument("--http", required=True, metavar="HOST:PORT", help="where to listen")
    parser.add_argument("--token-file", required=True, type=Path, help="holds the bearer token")
    given = parser.parse_intermixed_args(arguments)

    def run(config: Config) -> None:
        from kimi_core.cluster.handshake import address_of, read_token
        from kimi_core.cluster.life import EngineLife
        from kimi_core.cluster.service import serve

        address, token = address_of(given.http), read_token(given.token_file).decode()
        serve(EngineLife(config), *address, token)

    return with_config(given.arguments, run)


def worker(arguments: Sequence[str]) -> int:
    parser = parser_of("worker", WORKER)
    parser.add_argument("--connect", required=True, metavar="HOST:PORT", help="cluster.listen")
    parser.add_argument("--token-file", required=True, type=Path, help="a copy of the run's")
    parser.add_argument("--name", help="under which the run knows this worker (HOST-PID)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds for which a run that does not answer is tried again (600)",
    )
    given = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # Hosts without a name are no news.

    from kimi_core.cluster.handshake import address_of, read_token
    from kimi_core.cluster.worker import Place, serve

    try:
        place = Place(
            address_of(given.connect),
            read_token(given.token_file),
            given.name or f"{socket.gethostname()}-{os.getpid()}",
            given.threads or int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        )
    except ValueError as error:
        return fail(str(error), 2)
    return serve(place, patience_s=given.patience, say=lambda text: print(text, flush=True))
