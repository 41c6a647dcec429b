"""The best checkpoint of a run, by one accuracy of its evaluations, and the early end of a run.

``evaluation.best`` names the accuracy. The policy is written to ``runs/NAME/best/`` when an
evaluation is better than that of the checkpoint which is there; of equal ones the first stays.
A state is saved before each evaluation that may decide, and the evaluation is one line of
metrics.jsonl. A run that is killed in between therefore resumes with these weights and this line,
and decides the same.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kimi_core import metrics
from kimi_core.config import EvaluationConfig
from kimi_core.metrics import EvaluationMetrics
from kimi_core.run.build import Parts
from kimi_core.run.files import discard, read_object
from kimi_core.run.folder import BEST, RunFolder

RECORD = "best.json"
"""The file in ``best/`` that says which evaluation it is of."""


@dataclass(frozen=True)
class Best:
    """What the checkpoint in ``best/`` is."""

    iteration: int
    metric: str
    """The value of ``evaluation.best``."""
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.3f} after iteration {self.iteration}"


def read_best(path: Path) -> Best | None:
    """The best checkpoint of the run at ``path``; None: it has none.

    Raises:
        ValueError: what says which evaluation it is of is damaged.
    """
    record = path / BEST / RECORD
    if not record.is_file():
        return None
    way_out = f"remove the folder {path / BEST}; the best is then looked for again"
    found = read_object(record, way_out)
    try:
        return Best(int(found["iteration"]), str(found["metric"]), float(found["value"]))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{record} is damaged ({error!r}): {way_out}") from None


def keep_best(
    parts: Parts, settings: EvaluationConfig, folder: RunFolder, last: EvaluationMetrics
) -> None:
    """Write the present policy to ``best/``, if ``last``, its evaluation, is the best so far.

    Raises:
        OSError: the disk is full; the checkpoint that was there is as it was.
    """
    now = Best(last.iteration, settings.best, last.value(settings.best))
    before = read_best(folder.path)
    if before is not None and before.metric == now.metric and not now.value > before.value:
        return
    if not math.isnan(now.value):
        folder.save_checkpoint(
            parts.loop.trainer,
            parts.tokenizer,
            parts.images,
            name=BEST,
            also={RECORD: json.dumps(asdict(now)) + "\n"},
        )


def forget_later(path: Path, iteration: int) -> str:
    """Remove a best checkpoint of a later iteration, which will come another time.

    Returns what to say; empty: nothing was removed.
    """
    found = read_best(path)
    if found is None or found.iteration <= iteration:
        return ""
    discard(path / BEST)
    return f"the best checkpoint was of iteration {found.iteration}; the best is looked for again"


def is_stuck(evaluations: Sequence[EvaluationMetrics], settings: EvaluationConfig) -> bool:
    """Whether the last ``patience`` evaluations have all been no better than one before them."""
    if settings.patience is None:
        return False
    return metrics.is_stuck([one.value(settings.best) for one in evaluations], settings.patience)
