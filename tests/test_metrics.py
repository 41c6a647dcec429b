"""The records of a run: every field is described on the page that users read."""

from dataclasses import fields
from pathlib import Path

import pytest

from kimi_core.metrics import EvaluationMetrics, IterationMetrics
from kimi_core.run.trajectories import TrajectoryRecord

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


@pytest.mark.parametrize("kind", [IterationMetrics, EvaluationMetrics])
def test_every_field_is_in_the_docs(kind: type) -> None:
    text = DOCS.read_text()
    table = text[text.index('### `"kind": "' + kind.__name__[:9].lower()) :]
    missing = [f.name for f in fields(kind) if f"\n| `{f.name}` |" not in table]
    assert not missing, f"docs/metrics.md does not describe {missing}"


def test_every_field_of_a_trajectory_is_in_the_docs() -> None:
    text = DOCS.read_text()
    table = text[text.index("## `trajectories/") :]
    missing = [f.name for f in fields(TrajectoryRecord) if f"\n| `{f.name}` |" not in table]
    assert not missing, f"docs/metrics.md does not describe {missing}"
