"""Commands that look at runs, or ask their models, and change nothing."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kimi_core.cli.help import CHAT, DASHBOARD
from kimi_core.cli.parser import fail
from kimi_core.cli.settings import parser_of

PORT = 8765


def dashboard(arguments: Sequence[str]) -> int:
    parser = parser_of("dashboard", DASHBOARD)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="of one run or of many (runs)"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any that is free ({PORT})")
    parser.add_argument("--bundle", type=Path, metavar="OUT", help="write a static copy to OUT")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[], metavar="N", help="in the copy (all)"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        from kimi_core.dashboard.bundle import write_bundle
        from kimi_core.dashboard.runs import Runs
        from kimi_core.dashboard.server import serve
    except ModuleNotFoundError as error:
        return fail(f"The dashboard needs {error.name}: pip install 'kimi-core[dashboard]'", 2)
    try:
        runs = Runs(given.folder)
        if given.bundle is None:
            serve(runs, given.port, lambda url: print(f"dashboard: {url}", flush=True))
        else:
            count = write_bundle(runs, given.bundle, given.iterations)
            print(f"static copy: {given.bundle / 'index.html'} ({count} answers)")
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(str(error), 1)
    return 0


def chat(arguments: Sequence[str]) -> int:
    parser = parser_of("chat", CHAT)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("text", nargs="*", metavar="PROMPT", help="prompts (default: typed lines)")
    parser.add_argument("--prompt", type=int, metavar="N", help="the run's prompt with this id")
    parser.add_argument("--answer", help="reference answer to what is asked")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="responses (4)")
    parser.add_argument("--at", type=int, metavar="ITERATION", help="the state after it (newest)")
    parser.add_argument("--before", action="store_true", help="ask the start of RL as well")
    given = parser.parse_intermixed_args(arguments)
    if given.samples < 1:
        return fail(f"--samples {given.samples}: at least 1", 2)
    asked = [*given.text] if given.prompt is None else [given.prompt, *given.text]

    from kimi_core.reward.base import RewardError
    from kimi_core.run.chat import chat as ask

    options = {"samples": given.samples, "answer": given.answer}
    try:
        lines = ask(given.run, asked or _typed(), **options, at=given.at, before=given.before)
        for line in lines:
            print(line, flush=True)
    except ValueError as error:
        return fail(str(error), 2)
    except (OSError, RewardError) as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _typed() -> Iterator[str]:
    """Lines of standard input until its end; a terminal is asked for each."""
    while True:
        if sys.stdin.isatty():
            print("prompt (Ctrl-D ends): ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.rstrip("\n")
