"""The records of a run as TensorBoard events: numbers, samples as text, and settings."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core.metrics import EvaluationMetrics, IterationMetrics, leaves, to_record
from kimi_core.models.images import checked, decoded
from kimi_core.run.previews import sampled_previews

ACCURACIES = ("evaluation/accuracy_greedy", "evaluation/accuracy_sampled")
"""What TensorBoard's table of settings shows of a run."""


class TensorBoard:
    """Every number of every record, as ``iteration/NAME`` and ``evaluation/NAME``.

    Args:
        run: the run folder. Events are written to ``tensorboard/`` there.
        iterations, evaluations: what was recorded before, as metrics.jsonl has it.
        settings: of the run, by dotted name.
        done: iterations done; later samples are left out.
    """

    def __init__(
        self,
        run: Path,
        iterations: Sequence[IterationMetrics],
        evaluations: Sequence[EvaluationMetrics],
        settings: Mapping[str, Any],
        done: int,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Slow to load.

        # Made again from the run's files: a killed run may have lost points, or have some too many.
        for old in (run / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self._run, self._samples = run, run / "samples"
        self._writer = SummaryWriter(str(run / "tensorboard"))
        self._add_settings(settings)
        for kind, records in (("iteration", iterations), ("evaluation", evaluations)):
            for record in records:
                self._add(kind, record)
        for path in sorted(self._samples.glob("*.txt")):
            if int(path.stem) <= done:
                self.samples(int(path.stem))
        self._writer.flush()

    def take(self, kind: str, metrics: IterationMetrics | EvaluationMetrics) -> None:
        self._add(kind, metrics)
        self._writer.flush()

    def samples(self, iteration: int) -> None:
        """Show ``samples/000010.txt``: indented, so that Markdown leaves the text as it is.

        The images of the prompts go with it, as ``samples/SAMPLE-IMAGE``.
        """
        text = (self._samples / f"{iteration:06d}.txt").read_text()
        indented = "\n".join(f"    {line}" for line in text.split("\n"))
        self._writer.add_text("samples", indented, iteration)
        for sample, place, path in sampled_previews(text):
            with suppress(ValueError):  # The machine may have died before all of it was written.
                pixels = np.asarray(decoded(checked(self._run / path)))
                name = f"samples/{sample}-{place}"
                self._writer.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()

    def _add(self, kind: str, metrics: IterationMetrics | EvaluationMetrics) -> None:
        for name, value in leaves(to_record(metrics)):
            if name != "iteration" and value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, metrics.iteration)

    def _add_settings(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        if not settings:
            return
        # ``SummaryWriter.add_hparams`` would make a second run of them.
        for summary in hparams(dict(settings), dict.fromkeys(ACCURACIES, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
