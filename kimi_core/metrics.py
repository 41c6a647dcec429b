"""What a run reports: ``metrics.jsonl``, TensorBoard, sampled trajectories, progress, a summary.

``docs/metrics.md`` describes the files. A number that was not measured, or is not finite, is NaN
here and ``null`` in the files.
"""

import json
import math
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from kimi_core.run.folder import write_atomically
from kimi_core.types import EndReason


@dataclass(frozen=True, kw_only=True)
class IterationMetrics:
    """One RL iteration: a rollout phase, then a training phase."""

    iteration: int
    """Which one, counted from 1; after it, so many are done."""
    policy_version: int
    """Version of the weights that sampled in this iteration."""
    wall_s: float
    """Seconds of wall-clock time from start to end, without evaluation."""
    cpu_s: float
    """Seconds of CPU time of the process, all threads."""
    rollout_s: float
    """Seconds of wall-clock time in the rollout phase."""
    train_s: float
    """Seconds of wall-clock time in the training phase."""
    reward_mean: float
    """Mean reward of the responses trained, with length reward and penalties."""
    accuracy_sampled: float
    """Mean correctness of the responses trained, as sampled in training, in [0, 1]."""
    length_mean: float
    """Mean length of the responses trained, tokens."""
    tokens_sampled: int
    """Output tokens sampled."""
    tokens_per_s: float
    """Output tokens sampled per second of the rollout phase."""
    decode_steps: int
    """Decoding steps of the engine, each one token for every open trajectory of a batch."""
    trajectories_finished: int
    """Responses that ended."""
    trajectories_unfinished: int
    """Responses that spent their budget and wait in the buffer for the next iteration."""
    repeat_stops: int
    """Responses that were ended for repeating themselves."""
    samples_trained: int
    """Responses trained."""
    samples_trained_total: int
    """Responses trained since the start of RL."""
    tokens_stale_share: float
    """Share of the trained tokens that an older version than this one's sampled, in [0, 1]."""
    max_staleness: int
    """Age of the oldest token trained, in versions."""
    logprob_gap_mean: float
    """Mean |Δ log-prob| between engine and trainer on tokens of this iteration, nats."""
    logprob_gap_max: float
    """Largest |Δ log-prob| between engine and trainer on tokens of this iteration, nats."""
    reference_recomputed: bool
    """Whether the gap was over its limit, so that the trainer computed the reference itself."""
    loss: float
    """Mean loss per response over the updates; its value shows no progress, its jumps trouble."""
    grad_norm: float
    """Mean norm of the gradient over the updates, before clipping."""
    entropy: float = math.nan
    """Mean −log-prob of the tokens sampled, nats: an estimate of the policy's entropy a token."""
    zero_advantage_share: float = math.nan
    """Share of the responses trained with an advantage of 0, which teach nothing, in [0, 1]."""
    infrastructure_errors: int = 0
    """Responses on which no verdict could be reached: neither trained nor counted as wrong."""
    logprob_gap_over_limit_share: float = math.nan
    """Share of this iteration's tokens whose |Δ log-prob| is over the limit, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation on held-out prompts."""

    iteration: int
    """RL iterations done before it; 0 is the policy that RL starts from, after SFT."""
    policy_version: int
    """Version of the weights evaluated."""
    accuracy_greedy: float
    """Mean correctness of one response a prompt, most likely token each time, in [0, 1]."""
    accuracy_sampled: float
    """Mean correctness of one response a prompt, sampled as in training, in [0, 1]."""
    length_mean: float
    """Mean length of the sampled responses, tokens."""
    n: int
    """Prompts."""
    seed: int
    """Seed of the sampled responses."""
    wall_s: float = math.nan
    """Seconds of wall-clock time."""
    infrastructure_errors: int = 0
    """Responses, greedy and sampled, on which no verdict could be reached; in neither accuracy."""


KINDS: dict[str, type] = {"iteration": IterationMetrics, "evaluation": EvaluationMetrics}
"""What the ``kind`` of a line of ``metrics.jsonl`` may be, and what it then holds."""

Sample = tuple[str, str, float, EndReason | None, Sequence[int]]
"""Prompt, response, reward, why it ended (None: it goes on), policy version of each token."""


def read_metrics(path: str | Path) -> tuple[list[IterationMetrics], list[EvaluationMetrics]]:
    """Read a ``metrics.jsonl`` in file order. Keys this version does not know are left out.

    A torn last line, as a killed process leaves it, is skipped; a missing file is empty.

    Raises:
        ValueError: another line is not a line of metrics; the message names it.
    """
    iterations: list[IterationMetrics] = []
    evaluations: list[EvaluationMetrics] = []
    for _, record in _read_lines(Path(path)):
        values = {name: math.nan if value is None else value for name, value in record.items()}
        if values.pop("kind") == "iteration":
            iterations.append(IterationMetrics(**_known(IterationMetrics, values)))
        else:
            evaluations.append(EvaluationMetrics(**_known(EvaluationMetrics, values)))
    return iterations, evaluations


class MetricsWriter:
    """Takes the metrics of a run as they come, and tells user and files. Use it in ``with``.

    Report an iteration before its state is saved: then every state finds its line on resume, and a
    line without a state is cut off and comes again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_iterations: int,
        start_iteration: int = 0,
        console: Console | None = None,
    ) -> None:
        """Go on after ``start_iteration``: lines of later iterations in ``folder`` are cut off.

        Args:
            folder: the run folder; it exists.
            total_iterations: what progress and ETA count towards.
            start_iteration: iterations done in the state that the run goes on from.
            console: where progress goes; standard output unless given.
        """
        from torch.utils.tensorboard import SummaryWriter  # Readers need not wait for it.

        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self.total_iterations = total_iterations
        self.console = console or Console()
        _cut_after(self.path, start_iteration)
        self.iterations, self.evaluations = read_metrics(self.path)
        self._tensorboard = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=start_iteration + 1
        )
        self._recent_wall_s: deque[float] = deque(maxlen=10)
        self._closed = False
        self._progress = Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.description}", table_column=Column(no_wrap=False), markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            f"iter {start_iteration}/{total_iterations}",
            total=total_iterations,
            completed=start_iteration,
        )
        self._progress.start()

    def iteration(self, metrics: IterationMetrics) -> None:
        """Report an iteration.

        Raises:
            OSError: the line could not be written.
        """
        metrics = _plain(metrics)
        self.iterations.append(metrics)
        self._write("iteration", metrics)
        self._recent_wall_s.append(metrics.wall_s)
        line = progress_line(metrics, self.total_iterations, self._eta_s(metrics.iteration))
        if self.console.is_terminal:
            self._progress.update(self._task, completed=metrics.iteration, description=line)
        else:
            self._print(line)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Report an evaluation. Raises OSError as ``iteration`` does."""
        metrics = _plain(metrics)
        self.evaluations.append(metrics)
        self._write("evaluation", metrics)
        self._print(
            f"evaluation after {metrics.iteration}  greedy {metrics.accuracy_greedy:.3f}  "
            f"sampled {metrics.accuracy_sampled:.3f}  length {metrics.length_mean:.1f}  "
            f"n {metrics.n}{_no_verdict(metrics)}"
        )

    def sample_text(self, iteration: int, samples: Iterable[Sample]) -> None:
        """Write trajectories to ``samples/000010.txt`` for a person to read.

        What a model writes is not to be trusted: characters that steer a terminal are written as
        escapes, and every line of it stands behind a bar, so that it cannot pose as ours.
        """
        blocks = [f"Iteration {iteration}\n"]
        for number, (prompt, response, reward, end_reason, versions) in enumerate(samples, 1):
            sampled = sorted({int(version) for version in versions if version >= 0})
            blocks.append(
                f"--- {number}: reward {reward:.4g}, end {end_reason or 'open'}, "
                f"policy versions {', '.join(map(str, sampled)) or 'none'}\n"
                f"prompt\n{_behind_bars(prompt)}\nresponse\n{_behind_bars(response)}\n"
            )
        path = self.folder / "samples" / f"{iteration:06d}.txt"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "\n".join(blocks))

    def close(self, *, sft_s: float = 0.0) -> None:
        """Write ``summary.json`` and ``curves.png`` and print the table before → after; once.

        Args:
            sft_s: wall-clock seconds of SFT, added to the wall time of the summary.
        """
        if self._closed:
            return
        self._closed = True
        self._progress.stop()
        self._tensorboard.close()
        summary = summarize(self.iterations, self.evaluations, sft_s=sft_s)
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        from kimi_core.run.curves import draw_curves  # Brings matplotlib, which only the end needs.

        draw_curves(self.iterations, self.evaluations, self.folder / "curves.png")
        if self.evaluations:
            self.console.print(_before_after(self.evaluations[0], self.evaluations[-1], summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, kind: str, metrics: IterationMetrics | EvaluationMetrics) -> None:
        record = _to_record(metrics)
        _append(self.path, json.dumps({"kind": kind} | record, allow_nan=False) + "\n")
        for name, value in record.items():
            if name != "iteration" and value is not None:
                self._tensorboard.add_scalar(f"{kind}/{name}", value, metrics.iteration)
        self._tensorboard.flush()

    def _eta_s(self, done: int) -> float:
        mean = sum(self._recent_wall_s) / len(self._recent_wall_s)
        return mean * max(0, self.total_iterations - done)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_line(metrics: IterationMetrics, total: int, eta_s: float) -> str:
    """One line about an iteration, as ``iter 12/60  reward 0.61  …  eta 2:14``."""
    trajectories = metrics.trajectories_finished + metrics.trajectories_unfinished
    unfinished = metrics.trajectories_unfinished / max(1, trajectories)
    return (
        f"iter {metrics.iteration}/{total}  reward {metrics.reward_mean:.2f}  "
        f"accuracy {metrics.accuracy_sampled:.2f}  length {metrics.length_mean:.1f}  "
        f"{metrics.tokens_per_s:.0f} tok/s  unfinished {unfinished:.0%}  "
        f"mismatch {metrics.logprob_gap_mean:.1e}{_no_verdict(metrics)}  eta {_clock(eta_s)}"
    )


def _no_verdict(metrics: IterationMetrics | EvaluationMetrics) -> str:
    count = metrics.infrastructure_errors
    return f"  no verdict {count}" if count else ""


def summarize(
    iterations: Sequence[IterationMetrics],
    evaluations: Sequence[EvaluationMetrics],
    *,
    sft_s: float = 0.0,
) -> dict[str, Any]:
    """The content of ``summary.json``; evaluations are None where none was made."""
    spans_s = [m.wall_s for m in iterations] + [e.wall_s for e in evaluations]
    return {
        "iterations": iterations[-1].iteration if iterations else 0,
        "wall_s": sft_s + sum(span for span in spans_s if math.isfinite(span)),
        "tokens_sampled": sum(m.tokens_sampled for m in iterations),
        "samples_trained": sum(m.samples_trained for m in iterations),
        "infrastructure_errors": sum(m.infrastructure_errors for m in iterations),
        "first_evaluation": _to_record(evaluations[0]) if evaluations else None,
        "last_evaluation": _to_record(evaluations[-1]) if evaluations else None,
    }


def visible(text: str) -> str:
    """``text`` with everything but line feeds that does not print as itself written as an escape.

    >>> visible("1\\x1b[2J")
    '1\\\\x1b[2J'
    """
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode() for c in text)


def _prints(char: str) -> bool:
    category = unicodedata.category(char)
    return char == "\n" or (category[0] != "C" and category not in ("Zl", "Zp"))


def _behind_bars(text: str) -> str:
    return "\n".join(f"  | {line}" for line in visible(text).split("\n"))


def _clock(seconds: float) -> str:
    """Seconds as ``2:14`` or ``1:02:14``; ``?`` where not finite."""
    if not math.isfinite(seconds):
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _before_after(
    first: EvaluationMetrics, last: EvaluationMetrics, summary: dict[str, Any]
) -> Table:
    table = Table(
        "held out",
        *(Column(heading, justify="right") for heading in ("before", "after", "change")),
        title=f"{summary['iterations']} iterations, {_clock(summary['wall_s'])}, "
        f"{summary['tokens_sampled']:,} tokens sampled",
    )
    for name, before, after, form in (
        ("accuracy, greedy", first.accuracy_greedy, last.accuracy_greedy, ".3f"),
        ("accuracy, sampled", first.accuracy_sampled, last.accuracy_sampled, ".3f"),
        ("length, tokens", first.length_mean, last.length_mean, ".1f"),
    ):
        table.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after - before:+{form}}")
    table.add_row("prompts", str(first.n), str(last.n))
    return table


def _to_record(metrics: IterationMetrics | EvaluationMetrics) -> dict[str, Any]:
    """As JSON allows it: what is not finite is None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(metrics).items()
    }


def _plain(metrics: Any) -> Any:
    """The same metrics with Python numbers for the scalars of numpy and torch."""
    scalars = {k: v.item() for k, v in vars(metrics).items() if hasattr(v, "item")}
    return replace(metrics, **scalars)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line with what it says."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # What follows the last line feed is torn or empty.
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            raise ValueError(f"{path}, line {number}: its kind must be {' or '.join(KINDS)}")
        required = {f.name for f in fields(KINDS[record["kind"]]) if f.default is MISSING}
        if missing := sorted(required - record.keys()):
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}")
        records.append((line, record))
    return records


def _cut_after(path: Path, iteration: int) -> None:
    """Drop what was written after the state of ``iteration``, and a torn last line."""
    if path.exists():
        kept = [line for line, record in _read_lines(path) if record["iteration"] <= iteration]
        write_atomically(path, b"".join(line + b"\n" for line in kept))


def _append(path: Path, line: str) -> None:
    """Add a line durably and with one ``write``, so that nobody ever sees two lines mixed."""
    content = line.encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    if written < len(content):
        raise OSError(
            f"{path} took {written} of {len(content)} bytes: the disk is full; make room and "
            "continue with --resume, which drops the torn line"
        )
