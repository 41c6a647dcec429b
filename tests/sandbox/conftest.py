"""What the tests of the sandbox share: a pool that runs them all."""

import os
import shutil
from collections.abc import Iterator

import pytest

from kimi_core.sandbox import Pool

SECRET = "kimi-secret-5d1f"


@pytest.fixture(scope="session")
def weak() -> bool:
    """Whether to run though a protection is missing: for root in a cgroup all hold."""
    return os.geteuid() != 0


@pytest.fixture(scope="session")
def bwrap() -> None:
    if shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")


@pytest.fixture(scope="session")
def pool(bwrap: None, weak: bool) -> Iterator[Pool]:
    os.environ["KIMI_TOKEN"] = SECRET
    with Pool(2, allow_weak=weak) as pool:
        yield pool
    del os.environ["KIMI_TOKEN"]
