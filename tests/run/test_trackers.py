"""Trackers get every number of a run, and cannot stop it."""

import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from records import EVALUATION, ITERATION
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY

from kimi_core.run import trackers
from kimi_core.run.config_file import load_config, plain_settings
from kimi_core.run.report import Report
from kimi_core.run.run import train
from kimi_core.run.trackers import Tracker, load_tracker

SETTINGS = {"seed": 1, "trainer.tau": 0.01, "prompts.chat": False}
MINE = """
import json
from pathlib import Path

def start(folder, settings):
    lines = Path(folder, "mine.jsonl")

    def log(numbers, iteration):
        with lines.open("a") as file:
            file.write(json.dumps([iteration, settings["seed"], numbers]) + "\\n")

    log.close = lambda: Path(folder, "closed").touch()
    return log

def broken(folder, settings):
    raise SystemError("no such project")

def breaks(folder, settings):
    def log(numbers, iteration):
        Path(folder, "called").open("a").write("x")
        raise OSError("the service is away")
    return log
"""


def tracked(name: str, folder: Path, records: int = 3) -> str:
    """Hand records to a tracker, and return what it says."""
    said: list[str] = []
    tracker = Tracker(name, folder, SETTINGS, said.append)
    for number in range(1, records + 1):
        tracker.take("iteration", replace(ITERATION, iteration=number, loss=number / 2))
    easy = {"easy": {"accuracy_greedy": 0.25, "n": 4}}
    tracker.take("evaluation", replace(EVALUATION, iteration=records, sets=easy))
    tracker.close()
    return "\n".join(said)


def test_a_run_tells_a_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("tiny.toml").write_text(TINY)
    config = load_config("tiny.toml", ["tracker=mine.py:start", "seed=3"])
    done = train(config, console=Console(file=StringIO()))
    lines = [eval(line) for line in (done / "mine.jsonl").read_text().splitlines()]
    assert [(line[0], line[1]) for line in lines] == [(0, 3), (1, 3), (2, 3), (2, 3)]
    assert lines[0][2]["evaluation/n"] == 4 and lines[1][2]["iteration/samples_trained"] == 4
    assert (done / "closed").is_file()
    events = EventAccumulator(str(done / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "samples/text_summary" in tags["tensors"]
    (shown,) = events.Tensors("samples/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    assert text.startswith("    Iteration 2") and "    response" in text
    assert "_hparams_/experiment" in events.summary_metadata


@pytest.mark.parametrize("name", ["broken", "breaks"])
def test_an_error_is_one_warning(tmp_path, name):
    (tmp_path / "mine.py").write_text(MINE)
    said = tracked(f"{tmp_path}/mine.py:{name}", tmp_path)
    assert said.count("the run goes on") == 1 and "\n" not in said
    if name == "breaks":
        assert "OSError: the service is away" in said
        assert (tmp_path / "called").read_text() == "x"


def test_one_that_never_answers_does_not_hold_the_run_up(tmp_path, monkeypatch):
    ends = threading.Event()
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setitem(trackers.BUILT_IN, "json", lambda *_: lambda *_: ends.wait(60))
    assert "has not taken everything in 0.2 s" in tracked("json", tmp_path)
    ends.set()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandbb", "allowed are wandb, trackio, mlflow and file.py:function"),
        ("none.py:start", "none.py"),
    ],
)
def test_a_name_that_cannot_work_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        load_tracker(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        load_tracker("wandb")


def test_text_and_settings_are_rebuilt_at_a_resume(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in (1, 2):
        (tmp_path / f"samples/{number:06d}.txt").write_text(f"Iteration {number}\n")
    settings = plain_settings(load_config(None))
    quiet = Console(file=StringIO())
    for _ in range(2):
        with Report(
            tmp_path, total_iterations=3, start_iteration=1, settings=settings, console=quiet
        ):
            pass
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Tensors("samples/text_summary")] == [1]


def test_mlflow_takes_it_to_a_local_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "think"
    folder.mkdir()
    assert tracked("mlflow", folder) == ""
    assert tracked("mlflow", folder, records=4) == ""  # As a resumed run does.
    client = mlflow.MlflowClient()
    number = client.get_experiment_by_name(trackers.PROJECT).experiment_id
    (run,) = client.search_runs([number])
    assert run.info.run_name == "think" and run.data.params["trainer.tau"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "iteration/loss")
    assert {(one.step, one.value) for one in history} == {(n, n / 2) for n in (1, 2, 3, 4)}
    assert run.data.metrics["evaluation/sets/easy/accuracy_greedy"] == 0.25


def test_wandb_takes_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "think"
    folder.mkdir()
    assert tracked("wandb", folder) == ""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"iteration/loss" in content and b"evaluation/sets/easy/accuracy_greedy" in content


def test_trackio_takes_it_to_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when it is imported.
    pytest.importorskip("trackio")
    assert tracked("trackio", tmp_path / "think") == ""
    assert list((tmp_path / "trackio").glob("kimi_core*"))
