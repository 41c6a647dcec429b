"""CPU seconds and memory of what the benchmarks compare."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def cpu_s(*runs: Callable[[], object], rounds: int) -> list[float]:
    """The least CPU seconds of each, taken in turns."""
    best = [math.inf] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            start = time.process_time()
            run()
            best[index] = min(best[index], time.process_time() - start)
    return best


def in_a_process(script: str, *arguments: object) -> dict[str, float]:
    """The JSON that ``script`` prints last, run alone with one thread.

    Freed blocks return to the system at once, so that peaks of memory can be compared.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    """A line of this process's status, such as ``VmHWM``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
