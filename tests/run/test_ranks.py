"""Runs whose trainer has two ranks: the run of one process, and what happens when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console
from tiny_runs import TINY

import kimi_core
from kimi_core.metrics import read_metrics
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.trainer.ranks import RankFailed

SETTINGS = [
    "iterations=5",
    "sft.steps=3",
    "rollout.token_budget=5",
    "reward.function=reward.py:some",
    "trainer.learning_rate=1e-3",
    "trainer.ranks_timeout_s=240",
]
REWARD = """
def some(prompt, response):
    return sum(character in "1234" for character in response) / 8
"""
WAIT_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    (path / "tiny.toml").write_text(TINY)
    (path / "reward.py").write_text(REWARD)
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """Carries out a run, or goes on with it."""
    monkeypatch.chdir(folder)

    def go(*overrides: str) -> None:
        config = load_config("tiny.toml", [*SETTINGS, *overrides])
        train(config, resume=True, console=Console(file=StringIO()))

    return go


def iterations(name: str) -> list[dict]:
    """What the iterations of a run recorded; a later line replaces an earlier one."""
    if not Path(f"runs/{name}/metrics.jsonl").exists():
        return []
    found = {one.iteration: one for one in read_metrics(f"runs/{name}/metrics.jsonl")[0]}
    return [found[number] for number in sorted(found)]


def trajectories(name: str) -> list[dict]:
    files = sorted(Path(f"runs/{name}/trajectories").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def followers(pid: int) -> list[int]:
    children = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").glob("*/children")
        for child in thread.read_text().split()
    ]
    name = b"kimi_core.run.follower"
    return [child for child in children if name in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(what: Callable[[], object]) -> None:
    ends = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_two_ranks_one_dies_the_run_dies_and_goes_on(run):
    run("name=one")
    expected = iterations("one")
    assert [one.iteration for one in expected] == [1, 2, 3, 4, 5]
    assert sum(one.reward_mean > 0 for one in expected) >= 3
    assert any(one.trajectories_unfinished for one in expected)

    # One process begins, two go on, and a follower is killed.
    run("name=two", "iterations=1")
    killed = []

    def kill() -> None:
        wait_for(lambda: len(iterations("two")) == 2)
        killed.extend(followers(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    with pytest.raises(RankFailed, match=r"Rank 1 .*SIGKILL.*--resume"):
        run("name=two", "iterations=500", "trainer.ranks=2")
    killer.join()

    # The same command again; now the run's process is killed, and its follower ends, too.
    command = [sys.executable, "-P", "-m", "kimi_core.cli", "train", "--resume", "tiny.toml"]
    root = str(Path(kimi_core.__file__).parents[1])
    before = len(iterations("two"))
    master = subprocess.Popen(
        [*command, *SETTINGS, "name=two", "iterations=500", "trainer.ranks=2"],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: len(iterations("two")) > before)
    (follower,) = followers(master.pid)
    master.kill()
    master.wait()
    wait_for(lambda: not Path(f"/proc/{follower}").exists())

    # One process ends it.
    enough = max(5, len(iterations("two")) + 1)
    run("name=two", f"iterations={enough}")
    found = iterations("two")
    assert len(found) == enough
    for one, two in zip(expected, found, strict=False):
        for key in ("tokens_sampled", "samples_trained_total", "trajectories_unfinished"):
            assert getattr(one, key) == getattr(two, key), key
        assert two.loss == pytest.approx(one.loss, abs=1e-5, nan_ok=True)
        assert two.reward_mean == pytest.approx(one.reward_mean, nan_ok=True)
    same = ("iteration", "trajectory_id", "token_ids", "versions", "reward")
    sampled = {
        name: [[line[key] for key in same] for line in trajectories(name) if line["iteration"] <= 5]
        for name in ("one", "two")
    }
    assert sampled["one"] and sampled["one"] == sampled["two"]
