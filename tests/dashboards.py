"""``kimi dashboard`` in a process, for the tests and the bench."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def dashboard(*arguments: object) -> Iterator[str]:
    """Start ``kimi dashboard`` on a free port; gives its address, ending in a slash."""
    command = [sys.executable, "-m", "kimi_core.cli", "dashboard", *map(str, arguments)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("dashboard: http://127.0.0.1:"), line
            yield line.split()[1]
        finally:
            process.terminate()
            process.wait(timeout=30)
