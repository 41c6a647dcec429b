"""Rollout workers that Ray places: the same tokens as without, whoever is killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.two_hosts import SLOW, iterations, tokens_of, wait_for
from fleet_workers import CONTEXT, model
from rewarded_runs import REWARD, SETTINGS, go_on, sampled, write_files

import kimi_core
from kimi_core.config import ClusterConfig, RolloutConfig
from kimi_core.rollout.load import load_engine

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install '.[ray]'"
)
ACTOR = b"ray::RolloutActor"
RANK = b"kimi_core.run.follower"


def actors(run: int, name: bytes = ACTOR) -> list[int]:
    """Pids of the processes below ``run`` that have ``name`` on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name in (folder / "cmdline").read_bytes():
                parents = [int(folder.name)]
                while parents[-1] > 1 and run not in parents:
                    stat = Path(f"/proc/{parents[-1]}/stat").read_text()
                    parents.append(int(stat.rpartition(")")[2].split()[1]))
                found += parents[:1] * (run in parents)
        except OSError:  # It has ended meanwhile.
            pass
    return found


def train(name: str, *settings: str) -> subprocess.Popen:
    root = str(Path(kimi_core.__file__).parents[1])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kimi = [sys.executable, "-P", "-m", "kimi_core.cli", "train", "tiny.toml", f"name={name}"]
    given = [*SETTINGS, "trainer.learning_rate=1e-4", "reward.function=reward.py:slow"]
    return subprocess.Popen(
        [*kimi, *given, *settings],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
        | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_ray
@pytest.mark.nightly
def test_a_worker_that_ray_placed_is_killed_and_placed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    Path("reward.py").write_text(REWARD + SLOW)
    run = train("ray", "iterations=60", "cluster.address=local", "rollout.workers=2")
    try:
        wait_for(lambda: len(actors(run.pid)) == 2, "Ray starts two workers")
        wait_for(lambda: all(tokens_of(tmp_path, "ray", n) for n in (0, 1)), "both sample")
        killed = actors(run.pid)[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: any(one.worker_restarts for one in iterations(tmp_path, "ray")), "seen")
        wait_for(lambda: len({*actors(run.pid)} - {killed}) == 2, "Ray starts another")
        assert run.wait(400) == 0, run.stdout.read()
        ends = time.monotonic() + 60
        while actors(run.pid):
            assert time.monotonic() < ends, "workers are left"
            time.sleep(0.1)
    finally:
        run.kill()
    go_on("name=plain", "iterations=60", "trainer.learning_rate=1e-4")
    assert sampled("ray") == sampled("plain") != []
    assert sum(one.worker_restarts for one in iterations(tmp_path, "ray")) == 1


@needs_ray
@pytest.mark.nightly
def test_a_rank_that_ray_placed_is_killed_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    Path("reward.py").write_text(REWARD + SLOW)
    ours = ["ray", "iterations=30", "cluster.address=local", "trainer.ranks=2", "rollout.workers=1"]
    run = train(*ours)
    try:
        wait_for(lambda: len(iterations(tmp_path, "ray")) > 2, "the run trains")
        (killed,) = actors(run.pid, RANK)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: {*actors(run.pid, RANK)} - {killed}, "Ray starts another")
        (second,) = {*actors(run.pid, RANK)} - {killed}
        said, _ = run.communicate(timeout=400)
        assert run.returncode == 0, said
        assert f"Rank 1 of the trainer on {os.uname().nodename} ended by SIGKILL" in said
    finally:
        run.kill()
    go_on("name=plain", "iterations=30", "trainer.learning_rate=1e-4")
    assert sampled("ray") == sampled("plain") != []
    assert not Path(f"/proc/{second}").exists()


def test_a_run_without_a_cluster_never_loads_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    go_on("name=default", "iterations=1")
    assert len(iterations(tmp_path, "default")) == 1 and "ray" not in sys.modules


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"hybrid = true with cluster\.address"):
        ClusterConfig(address="auto", hybrid=True)
    monkeypatch.setitem(sys.modules, "ray", None)  # As if it were not installed.
    with pytest.raises(ValueError, match=r"needs ray: pip install 'kimi-core\[ray\]'"):
        load_engine(model(), RolloutConfig(), CONTEXT, cluster=ClusterConfig(address="auto"))
