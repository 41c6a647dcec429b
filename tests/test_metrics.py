"""The records of a run: every field is on the page that users read, and values have their types."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from records import EVALUATION, ITERATION

from kimi_core.metrics import EvaluationMetrics, IterationMetrics, read_metrics, to_record
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


@pytest.mark.parametrize(
    ("metrics", "changed", "said"),
    [
        (ITERATION, {"iteration": "3"}, "has iteration = '3'"),
        (ITERATION, {"iteration": None}, "has iteration = nan"),
        (ITERATION, {"reference_recomputed": 1}, "has reference_recomputed = 1"),
        (ITERATION, {"turn_s": {"wake": "x"}}, "has turn_s/wake = 'x'"),
        (EVALUATION, {"greedy_by_domain": []}, r"has greedy_by_domain = \[\]"),
        (EVALUATION, {"kind": {}}, "its kind must be"),
        (EVALUATION, {"kind": "resume"}, "lacks lost_s"),
        (EVALUATION, {"length_mean": None, "later": [1]}, None),
    ],
)
def test_a_value_of_another_type_is_named_with_its_line(tmp_path, metrics, changed, said):
    kind = type(metrics).__name__.removesuffix("Metrics").lower()
    lines = [{"kind": kind, **to_record(metrics)}, {"kind": kind, **to_record(metrics)} | changed]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if said is None:
        assert sum(map(len, read_metrics(path))) == 2
        return
    with pytest.raises(ValueError, match=f"line 2:? {said}"):
        read_metrics(path)
