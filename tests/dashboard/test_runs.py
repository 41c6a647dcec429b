"""What the pages are told of run folders: real ones, made ones and broken ones."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
from made_runs import make_run

from kimi_core.buffer import RolloutBuffer
from kimi_core.dashboard.locks import is_locked
from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.runs import Run, Runs
from kimi_core.metrics import read_metrics, to_record
from kimi_core.run.trajectories import read_trajectories


def test_a_trained_run_with_its_numbers(trained):
    found = Run("tiny", trained).summary()
    iterations, evaluations = read_metrics(trained / "metrics.jsonl")
    assert (found["state"], found["iteration"], found["iterations"]) == ("finished", 3, 3)
    assert found["before"]["accuracy_greedy"] == evaluations[0].accuracy_greedy
    assert found["after"]["iteration"] == 3
    curve = [(one.iteration, to_record(one)["accuracy_sampled"]) for one in iterations]
    assert found["curve"] == curve
    assert found["error"] == "" and found["eta_s"] is None


def test_nothing_in_a_run_changes_when_it_is_looked_at(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    run = Run("tiny", trained)
    for ask in (run.summary, run.settings, run.metrics, run.iterations, run.waiting, run.prompts):
        ask()
    for number in run.iterations():
        for one in run.iteration(number)["columns"]["trajectory_id"]:
            run.response(number, one)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert sorted(files) == sorted(path for path in trained.rglob("*") if path.is_file())


def test_the_texts_of_the_tokens_are_the_response(trained):
    run = Run("tiny", trained)
    for number in run.iterations():
        for one in read_trajectories(trained / "trajectories" / f"{number:06d}.jsonl"):
            found = run.response(number, one.trajectory_id)
            assert len(found["token_texts"]) == len(one.token_ids)
            assert "".join(found["token_texts"]).removesuffix("<eos>") == one.response


def test_a_run_without_a_tokenizer_has_tokens_without_texts(tmp_path):
    path = make_run(tmp_path / "run")
    for content in (None, "{}"):
        (path / "tokenizer.json").unlink(missing_ok=True)
        if content:
            (path / "tokenizer.json").write_text(content)
        assert Run("run", path).response(1, 0)["token_texts"] is None


def test_the_buffer_is_what_the_buffer_says(trained):
    run = Run("tiny", trained)
    found = run.waiting()
    with RolloutBuffer.open(trained / "buffer.bin", readonly=True) as buffer:
        stats = buffer.stats()
        infos = {info.trajectory_id: info for info in buffer.trajectories()}
        assert found["unfinished"] == stats.unfinished == len(buffer.unfinished())
        assert found["unfinished"] > 0  # The run has partial rollouts.
        assert [row["trajectory_id"] for row in found["rows"]] == list(infos)
        for row in found["rows"]:
            one = run.waiting_response(row["trajectory_id"])
            whole = buffer.read(row["trajectory_id"])
            assert one["token_ids"] == whole.response_ids.tolist()
            assert len(one["token_texts"]) == whole.response_length
            assert sum(count for _, count in row["segments"]) == whole.response_length
    with pytest.raises(Missing, match="does not hold response 12345 any more"):
        run.waiting_response(12345)


def test_prompts_have_their_rates_over_time(trained):
    found = Run("tiny", trained).prompts()["prompts"]
    lines = [json.loads(line) for line in (trained / "prompts.jsonl").read_text().splitlines()]
    assert sum(len(one["history"]) for one in found) == len(lines) > 0
    counts = {}
    for number in (1, 2, 3):
        for one in read_trajectories(trained / "trajectories" / f"{number:06d}.jsonl"):
            counts[one.prompt_id] = counts.get(one.prompt_id, 0) + 1
    assert {one["prompt_id"]: sum(row[3] for row in one["history"]) for one in found} == counts
    for one in found:
        assert one["weight"] == pytest.approx(1 - one["success_rate"], abs=2e-6)


def test_runs_are_found_at_any_depth_and_as_the_folder_itself(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "deep" / "b")
    assert [run.name for run in Runs(tmp_path).all()] == ["a", "deep/b"]
    assert [run.name for run in Runs(tmp_path / "a").all()] == ["a"]
    with pytest.raises(ValueError, match="is not a folder: give the folder of a run"):
        Runs(tmp_path / "nothing")


def test_links_to_other_places_are_not_followed(tmp_path):
    make_run(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    assert Runs(tmp_path / "runs").all() == []


def test_names_that_lead_out_are_no_runs(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "secret")
    runs = Runs(tmp_path / "runs")
    for name in ("../secret", "a/../../secret", str(tmp_path / "secret"), "", ".", "a/"):
        with pytest.raises(Missing, match="There is no run"):
            runs.run(name)


def test_broken_files_are_told_and_the_rest_is_shown(tmp_path):
    path = make_run(tmp_path / "run")
    (path / "config.toml").write_text("iterations = = 3")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"kind": "iteration", "iter')
    found = Run("run", path).summary()
    assert "config.toml cannot be read" in found["error"]
    assert (found["iteration"], found["broken_lines"], found["state"]) == (2, 1, "stopped")
    with pytest.raises(Missing, match="has no responses of iteration 9"):
        Run("run", path).iteration(9)
    (path / "buffer.bin").write_bytes(b"no buffer")
    with pytest.raises(ValueError, match="buffer"):
        Run("run", path).waiting()


def test_an_iteration_that_is_written_a_second_time_is_read_a_second_time(tmp_path):
    run = Run("run", make_run(tmp_path / "run"))
    assert len(run.iteration(1)["columns"]["reward"]) == 6
    path = run.path / "trajectories" / "000001.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert len(run.iteration(1)["columns"]["reward"]) == 2


def test_a_lock_is_seen_without_being_taken(tmp_path):
    path = make_run(tmp_path / "run") / "lock"
    assert not is_locked(path)
    path.write_text(f"{os.getpid()}\n")
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_locked(path)
        found = Run("run", path.parent).summary()
        assert found["state"] == "running" and found["eta_s"] == 0.0
    assert not is_locked(path)
    program = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", program, path], check=True)
