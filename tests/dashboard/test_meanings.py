"""The page explains the metrics that a run records."""

import re
from dataclasses import fields

from kimi_core.dashboard.server import PAGE
from kimi_core.metrics import EvaluationMetrics, IterationMetrics

UNEXPLAINED = {"iteration", "seed", "reward_parts"}


def test_every_metric_has_a_meaning():
    text = (PAGE / "meanings.js").read_text()
    known = set(re.findall(r"^  (\w+): \[", text, re.MULTILINE))
    kinds = (IterationMetrics, EvaluationMetrics)
    names = {one.name for kind in kinds for one in fields(kind)} - UNEXPLAINED
    assert names == known - {"accuracy"}
