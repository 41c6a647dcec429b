"""Makes the tests import the installed package rather than the source folder beside them.

The folder has no compiled module unless one was put there for development, and that one stays.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# On a busy machine any example may take long: timings decide no test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# The tests' tensors are tiny: threads that wait for each other would make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent

if not any(ROOT.glob("kimi_core/_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    # The same for what the tests start: `python -c` would look in the working directory first.
    os.environ["PYTHONSAFEPATH"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each CPU, 8 at most; none for benchmarks and for single tests.

    A benchmark must run alone, and a single test ends before a worker has started.
    """
    chosen = [str(argument) for argument in config.args]
    if any("::" in one or "benches" in Path(one).parts for one in chosen):
        return 0
    return min(8, len(os.sched_getaffinity(0)))


SHARES_THE_HOST = ("tests/sandbox/", "tests/reward/code/", "test_code_run.py", "test_humaneval.py")
"""Tests that start sandboxes: a pool removes the cgroups that dead pools of the host have left, and
some tests count them."""


SHARES_A_FIXTURE = (
    "tests/reward/math/",
    "tests/run/test_chat_run.py",
    "tests/run/test_run.py",
    "tests/test_loop.py",
    "tests/trainer/test_sharded.py",
)
"""Files with a fixture of many CPU-seconds, which every worker makes that gets one of the tests."""

CPU_S = 10.0
"""CPU-seconds of one test, above which it is made cheaper or marked slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that share something to one worker, and skip those of a GPU without one.

    First, because xdist reads the groups in the same hook.
    """
    import torch  # Not before OMP_NUM_THREADS is set.

    has_gpu = torch.cuda.is_available()
    for item in items:
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if any(part in item.path.as_posix() for part in SHARES_THE_HOST):
            item.add_marker(pytest.mark.xdist_group("sandboxes"))
        elif any(part in item.path.as_posix() for part in SHARES_A_FIXTURE):
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keep the CPU-seconds of this process and of the children that it has waited for."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_s", sum(os.times()[:4]) - before))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests that take much and do not say so."""
    for report in terminalreporter.getreports("passed"):
        spent = dict(report.user_properties).get("cpu_s", 0.0)
        if spent > CPU_S and not {"slow", "nightly"} & set(report.keywords):
            terminalreporter.write_line(
                f"{report.nodeid} took {spent:.0f} CPU-s: above {CPU_S:.0f}, make it cheaper or "
                "mark it slow"
            )
