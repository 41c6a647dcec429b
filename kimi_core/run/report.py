"""What a run reports: ``metrics.jsonl``, TensorBoard and progress, and a summary at its end.

Each of the three sinks takes every record as it comes.
"""

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from kimi_core.metrics import (
    EvaluationMetrics,
    IterationMetrics,
    plain,
    read_lines,
    read_metrics,
    summarize,
    to_record,
)
from kimi_core.run.best import read_best
from kimi_core.run.files import append_line, write_atomically
from kimi_core.run.tensorboard import TensorBoard
from kimi_core.run.trackers import Tracker

Metrics = IterationMetrics | EvaluationMetrics

SILENT = 20
"""Iterations after which the same kind of collapse is said a second time."""


class Sink(Protocol):
    """Takes the records of a run."""

    def take(self, kind: str, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class Report:
    """Hands the records of a run to its sinks. Use it in ``with``.

    Report an iteration before its state is saved. Then every state finds its line when the run is
    resumed, and a line without a state is cut off and comes again.

    Args:
        folder: the run folder; it exists. Lines of iterations after ``start_iteration`` are cut.
        total_iterations: what progress and remaining time count towards.
        start_iteration: iterations done in the state that the run continues from.
        sft_s: wall-clock seconds of SFT; part of the summary's wall time.
        cut_off_s: wall-clock seconds of an iteration that was cut off, and runs again.
        settings: of the run, by dotted name, for TensorBoard and trackers.
        tracker: another sink, as the setting names it.
        changed: settings that a resumed run has changed, key → [before, now].
        console: where progress goes; standard output unless given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_iterations: int,
        start_iteration: int = 0,
        sft_s: float = 0.0,
        cut_off_s: float = 0.0,
        settings: Mapping[str, Any] = MappingProxyType({}),
        tracker: str = "",
        changed: Mapping[str, list[Any]] = MappingProxyType({}),
        console: Console | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.console = console or Console()
        path = self.folder / "metrics.jsonl"
        resumed = path.exists()
        cut_s = _cut_after(path, start_iteration) + cut_off_s
        earlier = defaultdict[str, list[dict[str, Any]]](list)
        for _, record in read_lines(path):
            earlier[record["kind"]].append(record)
        self._lost_s = cut_s + sum(record["lost_s"] for record in earlier["resume"])
        self.iterations, self.evaluations = read_metrics(path)
        self._collapses = [(one["rule"], one["iteration"]) for one in earlier["collapse"]]
        there = {line.iteration for line in self.iterations}
        if missing := [n for n in range(1, start_iteration + 1) if n not in there]:
            self.console.print(
                f"{path} lacks {len(missing)} of the {start_iteration} iterations done, the first "
                f"{missing[0]}: no curve and no total counts them",
                highlight=False,
                soft_wrap=True,
            )
        self._sft_s = sft_s
        self._tensorboard = TensorBoard(
            self.folder, self.iterations, self.evaluations, settings, start_iteration
        )
        self._sinks: list[Sink] = [
            JsonLines(path),
            self._tensorboard,
            ProgressLines(self.console, start_iteration, total_iterations),
        ]
        if tracker:
            self._sinks.append(Tracker(tracker, self.folder, settings, self._say))
        self._closed = False
        here = {"iteration": start_iteration}
        lines = [{"kind": "resume", **here, "lost_s": cut_s}] if resumed else []
        told = {record["setting"]: record["now"] for record in earlier["change"]}
        for key, (before, now) in changed.items():
            if told.get(key) != now:  # Otherwise an earlier process that saved no state told it.
                one = {"kind": "change", **here, "setting": key, "before": before, "now": now}
                lines.append(one)
        for line in lines:
            append_line(path, json.dumps(line) + "\n")

    def iteration(self, metrics: IterationMetrics) -> None:
        """Report an iteration.

        Raises:
            OSError: the line could not be written.
        """
        self.iterations.append(plain(metrics))
        self._tell("iteration", self.iterations[-1])

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Report an evaluation. Raises OSError as ``iteration`` does."""
        self.evaluations.append(plain(metrics))
        self._tell("evaluation", self.evaluations[-1])

    def collapse(self, record: Mapping[str, Any], said: str) -> None:
        """Write down and say that a number has collapsed, unless that was said lately."""
        done = self.iterations[-1].iteration if self.iterations else 0
        if any(rule == record["rule"] and done < at + SILENT for rule, at in self._collapses):
            return
        self._collapses.append((record["rule"], done))
        line = {"kind": "collapse", "iteration": done, **record}
        append_line(self.folder / "metrics.jsonl", json.dumps(line) + "\n")
        self._say(f"warning: {said}")

    def samples(self, iteration: int) -> None:
        """Show the samples of an iteration, which are written."""
        self._tensorboard.samples(iteration)

    def evaluation_s(self, prompts: int) -> float | None:
        """Seconds that an evaluation takes, as the last one tells; None: there was none.

        Args:
            prompts: held-out ones; other sets are always evaluated as a whole.
        """
        timed = [one for one in self.evaluations if math.isfinite(one.wall_s) and one.n]
        if not timed:
            return None
        others_s = sum(one.get("wall_s", 0.0) for one in timed[-1].sets.values())
        return others_s + prompts * (timed[-1].wall_s - others_s) / timed[-1].n

    def close(self) -> None:
        """Write ``summary.json`` and ``curves.png``, print the table before → after; once."""
        if self._closed:
            return
        self._closed = True
        for sink in self._sinks:
            sink.close()
        summary = summarize(
            self.iterations, self.evaluations, sft_s=self._sft_s, lost_s=self._lost_s
        )
        if best := read_best(self.folder):
            summary["best"] = vars(best)
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        from kimi_core.run.curves import draw_curves  # Loads matplotlib, which only the end needs.

        draw_curves(self.iterations, self.evaluations, self.folder / "curves.png")
        if self.evaluations:
            self.console.print(_before_after(self.evaluations[0], self.evaluations[-1], summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close. A full disk at the end of a run that failed must not hide why it failed."""
        with suppress(OSError) if kind else nullcontext():
            self.close()

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tell(self, kind: str, metrics: Metrics) -> None:
        for sink in self._sinks:
            sink.take(kind, metrics)


class JsonLines:
    """A line of JSON per record in ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, kind: str, metrics: Metrics) -> None:
        line = json.dumps({"kind": kind} | to_record(metrics), allow_nan=False)
        append_line(self.path, line + "\n")

    def close(self) -> None:
        """Do nothing: every line is on the disk already."""


class ProgressLines:
    """A progress bar on a terminal, and a line per iteration elsewhere."""

    def __init__(self, console: Console, start_iteration: int, total_iterations: int) -> None:
        self.console = console
        self.total = total_iterations
        self._recent_wall_s: deque[float] = deque(maxlen=10)
        self._iterations, self._evaluations_s = 0, 0.0
        """Iterations of this process, and the time of evaluations between them."""
        self._progress = Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.description}", table_column=Column(no_wrap=False), markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            f"iter {start_iteration}/{total_iterations}",
            total=total_iterations,
            completed=start_iteration,
        )
        self._progress.start()

    def take(self, kind: str, metrics: Metrics) -> None:
        if isinstance(metrics, EvaluationMetrics):
            self._print(evaluation_line(metrics))
            if self._iterations and math.isfinite(metrics.wall_s):
                self._evaluations_s += metrics.wall_s
            return
        self._recent_wall_s.append(metrics.wall_s)
        self._iterations += 1
        mean_s = sum(self._recent_wall_s) / len(self._recent_wall_s)
        mean_s += self._evaluations_s / self._iterations
        eta_s = mean_s * max(0, self.total - metrics.iteration)
        line = progress_line(metrics, self.total, eta_s)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=metrics.iteration, description=line)
        else:
            self._print(line)

    def close(self) -> None:
        self._progress.stop()

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def evaluation_line(metrics: EvaluationMetrics) -> str:
    """A line about an evaluation, and one about each domain, if there are several, and each set."""
    lines = [f"evaluation after {metrics.iteration}  {_numbers(vars(metrics))}"]
    if len(metrics.greedy_by_domain) > 1:
        for domain, greedy in metrics.greedy_by_domain.items():
            sampled = metrics.sampled_by_domain.get(domain, math.nan)
            lines.append(f"  {domain}  greedy {greedy:.3f}  sampled {sampled:.3f}")
    if math.isfinite(metrics.same_answer):
        lines.append(f"  same answer to text and image {metrics.same_answer:.3f}")
    lines += [f"  {name}  {_numbers(numbers)}" for name, numbers in metrics.sets.items()]
    return "\n".join(lines)


def _numbers(of: Mapping[str, Any]) -> str:
    """The numbers of an evaluation set in one line."""
    unscored, chances = of.get("infrastructure_errors", 0), of.get("pass_at_k", {})
    several = "".join(f"  pass@{k} {one:.3f}" for k, one in chances.items() if k != "1")
    return (
        f"greedy {of.get('accuracy_greedy', math.nan):.3f}  "
        f"sampled {of.get('accuracy_sampled', math.nan):.3f}{several}  "
        f"length {of.get('length_mean', math.nan):.1f}  n {of['n']}"
        + (f"  no verdict {unscored}" if unscored else "")
    )


def progress_line(metrics: IterationMetrics, total: int, eta_s: float) -> str:
    """One line about an iteration, as ``iter 12/60  reward 0.61  …  eta 2:14``."""
    trajectories = metrics.trajectories_finished + metrics.trajectories_unfinished
    unfinished = metrics.trajectories_unfinished / max(1, trajectories)
    return (
        f"iter {metrics.iteration}/{total}  reward {metrics.reward_mean:.2f}  "
        f"accuracy {metrics.accuracy_sampled:.2f}  length {metrics.length_mean:.1f}  "
        f"{metrics.tokens_per_s:.0f} tok/s  unfinished {unfinished:.0%}  "
        f"mismatch {metrics.logprob_gap_mean:.1e}{_no_verdict(metrics)}  eta {clock(eta_s)}"
    )


def _no_verdict(metrics: Metrics) -> str:
    count = metrics.infrastructure_errors
    return f"  no verdict {count}" if count else ""


def clock(seconds: float) -> str:
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
        title=f"{summary['iterations']} iterations, {clock(summary['wall_s'])}, "
        f"{summary['tokens_sampled']:,} tokens sampled",
    )
    rows = [
        ("accuracy, greedy", first.accuracy_greedy, last.accuracy_greedy, ".3f"),
        ("accuracy, sampled", first.accuracy_sampled, last.accuracy_sampled, ".3f"),
        ("length, tokens", first.length_mean, last.length_mean, ".1f"),
        *_by_domain(first, last),
    ]
    for name, before, after, form in rows:
        table.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after - before:+{form}}")
    table.add_row("prompts", str(first.n), str(last.n))
    for name, of in last.sets.items():
        for metric in ("greedy", "sampled"):
            before, after = first.value(f"{name}/{metric}"), last.value(f"{name}/{metric}")
            change = f"{after - before:+.3f}"
            table.add_row(f"{name}, {metric}, n {of['n']}", f"{before:.3f}", f"{after:.3f}", change)
    return table


def _by_domain(
    first: EvaluationMetrics, last: EvaluationMetrics
) -> Iterator[tuple[str, float, float, str]]:
    """Rows of the table about each domain, if there are several, and about text and image."""
    for domain in last.greedy_by_domain if len(last.greedy_by_domain) > 1 else ():
        for metric in ("greedy", "sampled"):
            of = [getattr(one, f"{metric}_by_domain") for one in (first, last)]
            before, after = (one.get(domain, math.nan) for one in of)
            yield f"{domain}, {metric}", before, after, ".3f"
    if math.isfinite(last.same_answer):
        yield "same answer, text and image", first.same_answer, last.same_answer, ".3f"


def cut_off_s(folder: Path) -> float:
    """Seconds of an iteration that a kill cut off, until the last token that it stored.

    From the last line of metrics.jsonl to the last change of the buffer, as the disk knows them.
    """
    times = [folder / "metrics.jsonl", folder / "buffer.bin"]
    if not all(file.exists() for file in times):
        return 0.0
    reported, sampled = (file.stat().st_mtime for file in times)
    return max(0.0, sampled - reported)


def _cut_after(path: Path, iteration: int) -> float:
    """Drop lines that came after the state of ``iteration``, and a torn last line.

    Returns the wall-clock seconds of what the dropped lines report.
    """
    lines = read_lines(path)
    kept = [line for line, record in lines if record["iteration"] <= iteration]
    if path.exists():
        write_atomically(path, b"".join(line + b"\n" for line in kept))
    cut = [record for _, record in lines if record["iteration"] > iteration]
    return sum(record.get("wall_s") or 0.0 for record in cut)
