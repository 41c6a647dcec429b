"""The report of a run: its lines can be read back, whatever they hold and wherever they end."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import EVALUATION, ITERATION
from rich.console import Console

from kimi_core.metrics import (
    read_metrics,
    summarize,
    to_record,
)
from kimi_core.run.report import Report, evaluation_line, progress_line


def writer(folder: Path, output: io.StringIO | None = None, **arguments) -> Report:
    console = Console(file=output or io.StringIO(), width=80)
    return Report(folder, console=console, **{"total_iterations": 60} | arguments)


def run(folder: Path, iterations: range) -> None:
    """Iterations and, after each, an evaluation; leaves the writer open, as a kill does."""
    metrics = writer(folder, start_iteration=iterations.start - 1)
    for number in iterations:
        metrics.iteration(replace(ITERATION, iteration=number))
        metrics.evaluation(replace(EVALUATION, iteration=number))
    for sink in metrics._sinks:
        sink.close()


def test_lines_read_back_as_written(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.evaluation(EVALUATION)
        metrics.iteration(ITERATION)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([ITERATION], [EVALUATION])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").open()]
    assert kinds == ["evaluation", "iteration"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    with writer(tmp_path) as metrics:
        metrics.iteration(replace(ITERATION, grad_norm=value))
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["grad_norm"] is None
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0][0].grad_norm)


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    given = replace(ITERATION, loss=np.float32(0.5), tokens_sampled=np.int64(7))
    with writer(tmp_path) as metrics:
        metrics.iteration(given)
    [read], _ = read_metrics(tmp_path / "metrics.jsonl")
    assert (read.loss, read.tokens_sampled) == (0.5, 7)


def test_resume_drops_the_iterations_after_the_state(tmp_path: Path) -> None:
    run(tmp_path, range(1, 6))
    run(tmp_path, range(4, 8))  # The state was of iteration 3.
    iterations, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    assert [m.iteration for m in iterations] == list(range(1, 8))
    assert [e.iteration for e in evaluations] == list(range(1, 8))


@given(cut=st.integers(0, 10_000))
def test_a_file_torn_anywhere_loses_its_torn_line_only(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    line = json.dumps({"kind": "evaluation"} | to_record(EVALUATION)) + "\n"
    content = (line * 5).encode()
    path.write_bytes(content[: cut % len(content)])
    assert read_metrics(path) == ([], [EVALUATION] * (cut % len(content) // len(line)))


def test_resume_after_a_torn_line_leaves_whole_lines(tmp_path: Path) -> None:
    run(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iteration", "iterat')
    run(tmp_path, range(3, 4))
    assert [m.iteration for m in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3]


def test_no_file_means_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 1 is not JSON"),
        ("\xff", "line 1 is not JSON"),
        ("[1]", "must be iteration or evaluation"),
        ('{"kind": "sft"}', "must be iteration or evaluation"),
        ('{"kind": "evaluation", "iteration": 0}', "lacks accuracy_greedy"),
    ],
)
def test_a_line_that_is_no_metrics_is_named(tmp_path: Path, line: str, fault: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=fault):
        read_metrics(tmp_path / "metrics.jsonl")


def test_keys_of_other_versions_are_left_out(tmp_path: Path) -> None:
    record = {"kind": "evaluation", "mood": "fine"} | to_record(EVALUATION)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == [EVALUATION]


def test_progress_line() -> None:
    assert progress_line(ITERATION, 60, 134.4) == (
        "iter 12/60  reward 0.61  accuracy 0.63  length 48.2  1834 tok/s  unfinished 12%  "
        "mismatch 1.2e-06  eta 2:14"
    )
    assert progress_line(ITERATION, 60, 3734).endswith("eta 1:02:14")
    assert progress_line(ITERATION, 60, math.nan).endswith("eta ?")


def test_without_a_terminal_each_iteration_prints_one_line(tmp_path: Path) -> None:
    output = io.StringIO()
    metrics = writer(tmp_path, output, start_iteration=10)
    metrics.iteration(replace(ITERATION, iteration=11, wall_s=2.0))
    metrics.iteration(ITERATION)
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert "metrics.jsonl lacks 10 of the 10 iterations" in lines[0]
    assert lines[2].endswith("eta 1:55")  # 48 left at (2.0 + 2.8) / 2 s each
    metrics.close()


def test_on_a_terminal_the_line_is_replaced(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=130, _environ={"TERM": "xterm"})
    with Report(tmp_path, total_iterations=60, console=console) as metrics:
        metrics.iteration(ITERATION)
    assert "accuracy 0.63" in output.getvalue()
    assert "\x1b[?25h" in output.getvalue()  # The cursor is back.


def test_summary_adds_up_over_all_lines(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    output = io.StringIO()
    metrics = writer(tmp_path, output, start_iteration=3, sft_s=10.0)
    metrics.evaluation(replace(EVALUATION, iteration=3, accuracy_greedy=0.9))
    metrics.close()
    metrics.close()  # Once is enough, as leaving `with` after an explicit close does.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 3
    assert summary["wall_s"] == pytest.approx(10 + 3 * 2.8 + 4 * 2)
    assert summary["tokens_sampled"] == 3 * ITERATION.tokens_sampled
    assert summary["first_evaluation"]["iteration"] == 1
    assert summary["last_evaluation"]["accuracy_greedy"] == 0.9
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    table = output.getvalue()
    assert "before" in table
    assert "+0.400" in table
    assert table.count("accuracy, greedy") == 1


def test_domains_and_the_same_answer_are_said_where_there_are_some(tmp_path: Path) -> None:
    both = {"text": 0.5, "photos": 0.25}
    known = {"greedy_by_domain": both, "sampled_by_domain": both, "same_answer": 0.125}
    before = replace(EVALUATION, **known)
    after = replace(before, iteration=3, sampled_by_domain={"text": 0.75, "photos": math.nan})
    output = io.StringIO()
    with writer(tmp_path, output) as metrics:
        metrics.evaluation(before)
        metrics.evaluation(after)
    said = output.getvalue()
    assert "\n  text  greedy 0.500  sampled 0.750\n  photos  greedy 0.250  sampled nan\n" in said
    assert said.count("  same answer to text and image 0.125\n") == 2
    rows = [" ".join(line.replace("│", " ").split()) for line in said.splitlines()]
    assert "text, sampled 0.500 0.750 +0.250" in rows
    assert "same answer, text and image 0.125 0.125 +0.000" in rows
    alone = replace(EVALUATION, greedy_by_domain={"text": 0.5}, sampled_by_domain={"text": 0.5})
    assert evaluation_line(alone) == evaluation_line(EVALUATION)


def test_a_run_stopped_before_its_first_line_still_closes(tmp_path: Path) -> None:
    writer(tmp_path).close()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == summarize([], [])
    assert summary["first_evaluation"] is None


def test_curves_take_gaps_of_zero_and_what_was_not_measured(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        nothing = {"reward_mean": math.nan, "logprob_gap_mean": 0.0, "logprob_gap_max": math.nan}
        metrics.iteration(replace(ITERATION, **nothing))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    metrics._sinks[0].path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        metrics.iteration(ITERATION)
    metrics.close()
