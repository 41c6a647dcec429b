"""64 programs at once through the sandbox's HTTP service, beside the same pool without it.

    pip install '.[sandbox]' && pytest benches/bench_service.py      # half a minute

The service runs in a process of its own, on one slot a core, and 64 threads send one request each.
The programs sleep for 0.2 s, so the last ones wait for several seconds, longer than the 2 s that
each may take: a limit that counted the time in the queue would end them. Latencies are those of the
caller, queue included; the physical limit is 64 sleeps over the slots, one after the other.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kimi_core.sandbox import Limits, Pool, Result, SandboxUnavailable, Status

pytest.importorskip("uvicorn", reason="needs pip install 'kimi-core[sandbox]'")

from kimi_core.sandbox.client import SandboxClient

REQUESTS = 64
SLEEP_S = 0.2
PROGRAM = f"import time; time.sleep({SLEEP_S}); print(2 * int(input()))"
LIMITS = Limits(wall_s=2.0, cpu_s=1.0)
SLOTS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The URL of a service with its own pool."""
    command = [sys.executable, "-m", "kimi_core.sandbox", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                yield found[1]
                return
        pytest.skip("no sandbox on this machine: python -m kimi_core.sandbox check")
    finally:
        server.terminate()
        server.wait(60)


def latencies(run: Callable[..., Result]) -> np.ndarray:
    """Seconds from asking to the result of each of 64 runs that are asked for at once."""

    def one(number: int) -> float:
        started = time.perf_counter()
        done = run(PROGRAM, stdin=str(number).encode(), limits=LIMITS)
        assert (done.status, done.stdout) == (Status.OK, b"%d\n" % (2 * number)), done
        return time.perf_counter() - started

    with ThreadPoolExecutor(REQUESTS) as threads:
        return np.array(list(threads.map(one, range(REQUESTS))))


def test_64_at_once(service: str, ratios: Any) -> None:
    """None is timed out by the queue, and the way over HTTP costs little beside the wait."""
    try:
        pool = Pool()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    with pool:
        latencies(pool.run)  # Once before it counts, as for the service: threads, connections.
        direct = latencies(pool.run)
    with SandboxClient(service) as client:
        latencies(client.run)
        through = latencies(client.run)
    assert through.max() > LIMITS.wall_s, "the queue was too short to show anything"
    shown = ", ".join(f"p{q} {np.percentile(through, q):.2f} s" for q in (50, 99))
    name = f"64 at once on {SLOTS} slots, "
    for q in (50, 99):
        ratio = float(np.percentile(direct, q) / np.percentile(through, q))
        ratios.record(f"{name}p{q}", "pool without HTTP", ratio, 0.5, shown)
    limit = REQUESTS * SLEEP_S / SLOTS
    ratios.record(f"{name}last", "sleeps one by one", limit / float(through.max()), None, shown)
