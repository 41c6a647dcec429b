"""The sandbox from the shell.

kimi sandbox run [--time S] [--memory MB] [--json] PROGRAM [ARG ...] < stdin
kimi sandbox check
kimi sandbox serve [--host ADDRESS] [--port N] [--slots N] [--queue N]

PROGRAM is a file that is copied into the sandbox (a Python program `.py` or an executable), or the
name of a command of the host, such as `awk`.
`serve` is the HTTP service; its bearer token is read from KIMI_SANDBOX_TOKEN.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from kimi_core.sandbox import Limits, Pool, Result, SandboxUnavailable, Status, check
from kimi_core.sandbox.bubblewrap import find_python, numpy_folders
from kimi_core.sandbox.program import MB, TOKEN_VARIABLE

STATUS_CODES = {status: code for code, status in enumerate(Status)}
"""Exit status of `run`: 0 for OK, and another number for each other status."""


def main(arguments: list[str] | None = None) -> int:
    """Run one action and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return {"check": _check, "run": _run, "serve": _serve}[options.action](options)
    except (SandboxUnavailable, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kimi sandbox", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run one program; stdin is passed on")
    run.add_argument("--time", type=float, default=10.0, metavar="S", help="wall clock, seconds")
    run.add_argument("--memory", type=int, default=512, metavar="MB", help="of all processes")
    run.add_argument("--json", action="store_true", help="print the whole result as JSON")
    run.add_argument("--allow-weak", action="store_true", help="without a protection, too")
    run.add_argument("program")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    actions.add_parser("check", help="print the self-test")
    serve = actions.add_parser("serve", help="run programs for trainers on other hosts")
    serve.add_argument("--host", default="127.0.0.1", help="other than loopback needs a token")
    serve.add_argument("--port", type=int, default=8100, help="0: any free port")
    serve.add_argument("--slots", type=int, help="programs at a time (default: one per core)")
    serve.add_argument("--queue", type=int, default=256, help="programs that may wait")
    serve.add_argument("--allow-weak", action="store_true", help="without a protection, too")
    return parser


def _run(options: argparse.Namespace) -> int:
    limits = Limits(wall_s=options.time, cpu_s=options.time, memory_bytes=options.memory * MB)
    argv, files = _command(options.program, options.arguments)
    stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    with Pool(1, allow_weak=options.allow_weak, warm=False) as pool:
        result = pool.run(argv, stdin=stdin, files=files, limits=limits)
    _print(result, as_json=options.json)
    return STATUS_CODES[result.status]


def _command(program: str, arguments: list[str]) -> tuple[list[str], dict[str, bytes]]:
    path = Path(program)
    if not path.is_file():
        return [program, *arguments], {}
    start = [find_python(), path.name] if path.suffix == ".py" else [f"./{path.name}"]
    return [*start, *arguments], {path.name: path.read_bytes()}


def _print(result: Result, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
        return
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.stderr)
    because = f" ({result.detail})" if result.detail else ""
    print(
        f"{result.status}{because}: {result.cpu_s:.3f} s CPU, {result.wall_s:.3f} s wall, "
        f"{result.memory_bytes / MB:.1f} MB",
        file=sys.stderr,
    )


def _serve(options: argparse.Namespace) -> int:
    try:
        from kimi_core.sandbox.service import serve
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'kimi-core[sandbox]'") from None
    serve(
        options.host,
        options.port,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        slots=options.slots,
        queue=options.queue,
        allow_weak=options.allow_weak,
    )
    return 0


def _check(_: argparse.Namespace) -> int:
    report = check()
    print(report)
    python = find_python()
    if numpy_folders(python):
        print(f"programs run under {python}, with numpy")
    else:
        print(
            f"programs run under {python}, without numpy: it belongs to another version of Python, "
            "or it lies below a folder that is closed to other users (chmod o+x opens it)"
        )
    return 1 if report.missing else 0


if __name__ == "__main__":
    sys.exit(main())
