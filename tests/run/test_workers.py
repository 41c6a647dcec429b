"""Runs with several rollout workers: the run of one process, also when workers or the run die."""

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from rewarded_runs import (
    SETTINGS,
    children,
    command,
    go_on,
    iterations,
    sampled,
    wait_for,
    write_files,
)

from kimi_core.rollout import fleet
from kimi_core.run.config_file import load_config
from kimi_core.run.replay import replay
from kimi_core.run.run import evaluate_alone

NURSERY = "kimi_core.rollout.torch.worker"
"""The module that the nursery and its workers run."""

STREAMED = ["rollout.stream_tokens=2", "evaluation.every=100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers")
    write_files(path)
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """Carries out a run, or goes on with it."""
    monkeypatch.chdir(folder)
    return lambda *overrides: go_on(*STREAMED, *overrides)


def check_equal(name: str, other: str) -> None:
    """Two runs have the same tokens and samples, and losses and gradients within rounding."""
    assert sampled(name) == sampled(other) != []
    for one, two in zip(iterations(name), iterations(other), strict=True):
        for key in ("tokens_sampled", "samples_trained_total", "trajectories_unfinished"):
            assert getattr(one, key) == getattr(two, key), key
        for key in ("loss", "grad_norm", "reward_mean"):
            # Rounding grows: by 10 in 10 iterations of this run.
            bound = 1e-5 if one.iteration <= 20 else 1e-1
            near = pytest.approx(getattr(one, key), rel=bound, abs=bound, nan_ok=True)
            assert getattr(two, key) == near


def workers(pid: int) -> list[int]:
    """The rollout workers of a run's process, which its nursery has forked."""
    try:
        nurseries = children(pid, NURSERY)
        return [worker for nursery in nurseries for worker in children(nursery, NURSERY)]
    except OSError:  # One has just ended.
        return workers(pid)


class Killer(Thread):
    """Kills a random worker at a random moment of the run, ``kills`` times."""

    def __init__(self, name: str, kills: int) -> None:
        super().__init__()
        self.run_name = name
        self.kills, self.chance = kills, random.Random(kills)
        self.ended = Event()
        self.killed: dict[int, float] = {}
        """Process → when it was killed."""
        self.seen: dict[int, float] = {}
        """Process → when the fleet noticed."""

    def run(self) -> None:
        for _ in range(self.kills):
            before = len(iterations(self.run_name))
            while not self.ended.is_set() and (
                len(iterations(self.run_name)) == before or len(self.seen) < len(self.killed)
            ):
                time.sleep(0.005)
            shortest = min((one.wall_s for one in iterations(self.run_name)), default=0.0)
            time.sleep(self.chance.uniform(0, 3 * shortest))
            there = [pid for pid in workers(os.getpid()) if pid not in self.killed]
            if self.ended.is_set() or not there:
                return
            pid = self.chance.choice(there)
            os.kill(pid, signal.SIGKILL)
            self.killed[pid] = time.monotonic()

    def emit(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        for pid in self.killed:
            if f"(pid {pid})" in said and "SIGKILL" in said:
                self.seen.setdefault(pid, time.monotonic())
        return True


@pytest.fixture
def killer() -> Iterator[Callable[[str, int], Killer]]:
    made: list[Killer] = []

    def start(name: str, kills: int) -> Killer:
        made.append(Killer(name, kills))
        fleet.log.addFilter(made[-1].emit)
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.ended.set()
        one.join()
        fleet.log.removeFilter(one.emit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "length"), [(2, 6), pytest.param(20, 60, marks=pytest.mark.nightly)]
)
def test_workers_that_are_killed_change_nothing(run, killer, kills, length):
    whole, disturbed = f"whole{kills}", f"disturbed{kills}"
    run(f"name={whole}", f"iterations={length}")
    assert sum(one.reward_mean > 0 for one in iterations(whole)) >= 3
    assert any(one.trajectories_unfinished for one in iterations(whole))
    deaths = killer(disturbed, kills)
    run(f"name={disturbed}", f"iterations={length}", "rollout.workers=2")
    check_equal(whole, disturbed)
    found = iterations(disturbed)
    assert len(deaths.killed) == kills == len(deaths.seen)
    assert sum(one.worker_restarts for one in found) == kills
    for one in found:
        assert sum(one.worker_tokens.values()) == one.tokens_sampled
    assert workers(os.getpid()) == []
    late = [deaths.seen[pid] - deaths.killed[pid] for pid in deaths.killed]
    print(f"{kills} kills, seen after {max(late):.2f} s at most")


@pytest.mark.nightly
def test_the_run_dies_its_workers_end_and_ranks_take_it_over(run):
    run("name=one", "iterations=6")
    master = command(*STREAMED, "name=three", "iterations=6", "rollout.workers=2")
    wait_for(lambda: len(iterations("three")) >= 2)
    there = workers(master.pid)
    assert len(there) == 2
    master.kill()
    master.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in there))

    run("name=three", "iterations=6", "rollout.workers=2", "trainer.ranks=2")
    check_equal("one", "three")
    config = load_config("tiny.toml", [*SETTINGS, *STREAMED, "name=three", "rollout.workers=2"])
    assert all(same for same, _ in replay(Path("runs/three"), 6))
    assert evaluate_alone(config).n == 4
