"""``kimi push``, as far as it goes without the hub: what it refuses, and the page it writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from records import EVALUATION

from kimi_core.config import Config
from kimi_core.metrics import to_record
from kimi_core.run.config_file import dump_toml
from kimi_core.run.push import card, push
from kimi_core.run.replay import replay
from kimi_core.run.report import JsonLines


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "think"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint/config.json").write_text("{}")
    (folder / "config.toml").write_text(dump_toml(Config(seed=7)))
    lines = JsonLines(folder / "metrics.jsonl")
    lines.take("evaluation", EVALUATION)
    assert to_record(EVALUATION)["n"] == 500
    return folder


def test_the_page_has_accuracies_and_settings(run):
    text = card(run)
    assert "| 0 | 0.500 | 0.400 | 500 |" in text
    assert "seed = 7" in text and text.startswith("---\ntags:")


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [("me/think", {"best": True}, "set evaluation.best"), ("a/b/c", {}, "a/b/c")],
)
def test_what_cannot_work_is_refused_before_the_hub_is_asked(run, repo, options, said):
    with pytest.raises(ValueError, match=said):
        push(run, repo, **options)


@pytest.mark.parametrize("name", ["metrics.jsonl", "best/best.json"])
def test_a_damaged_file_is_named_and_nobody_is_told_to_log_in(run, name):
    (run / "best").mkdir()
    (run / name).write_text('{"kind": \n')
    with pytest.raises(ValueError, match=name):
        push(run, "me/think")


@pytest.mark.nightly
def test_without_a_network_it_says_how_to_log_in(run):
    """In a process, because the hub's library reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kimi_core.cli", "push", str(run), "me/think"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Cannot push to me/think" in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="none is not the folder of a run"):
        push(tmp_path / "none", "me/think", best=False, public=False)
    with pytest.raises(ValueError, match="none is not the folder of a run"):
        list(replay(tmp_path / "none", 3))
