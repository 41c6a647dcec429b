"""CPU seconds of what the benchmarks compare."""

import math
import time
from collections.abc import Callable


def cpu_s(*runs: Callable[[], object], rounds: int) -> list[float]:
    """The least CPU seconds of each, taken in turns."""
    best = [math.inf] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            start = time.process_time()
            run()
            best[index] = min(best[index], time.process_time() - start)
    return best
