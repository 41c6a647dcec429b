"""Commands that look at runs and change nothing."""

from collections.abc import Sequence
from pathlib import Path

from kimi_core.cli.help import DASHBOARD
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
