"""Runs whose trainer has two ranks: the run of one process, and what happens when a rank dies."""

import itertools
import os
import re
import signal
from pathlib import Path
from threading import Thread

import pytest
from rewarded_runs import children, command, go_on, iterations, sampled, wait_for, write_files

from kimi_core.loop import Loop
from kimi_core.trainer.ranks import RankFailed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    write_files(path)
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """Carries out a run, or goes on with it."""
    monkeypatch.chdir(folder)
    return lambda *overrides: go_on("iterations=5", *overrides)


def followers(pid: int) -> list[int]:
    return children(pid, "kimi_core.run.follower")


@pytest.mark.slow
@pytest.mark.nightly
def test_two_ranks_one_dies_and_the_run_goes_on(run):
    run("name=one")
    expected = iterations("one")
    assert [one.iteration for one in expected] == [1, 2, 3, 4, 5]
    assert sum(one.reward_mean > 0 for one in expected) >= 3
    assert any(one.trajectories_unfinished for one in expected)

    # One process begins, two go on, and a follower is killed: all ranks start again.
    run("name=two", "iterations=1")
    killed = []

    def kill() -> None:
        wait_for(lambda: len(iterations("two")) == 2)
        killed.extend(followers(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    said = run("name=two", "iterations=40", "trainer.ranks=2", "trainer.context_parallel=2")
    killer.join()
    assert re.search(r"Rank 1 of the trainer .* ended by SIGKILL\.\nAll ranks start again", said)
    assert len(iterations("two")) == 40

    # Two go on as a tensor-parallel group; the run's process is killed, and its follower ends, too.
    before = len(iterations("two"))
    master = command("name=two", "iterations=500", "trainer.ranks=2", "trainer.tensor_parallel=2")
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
    first, second = ([line for line in sampled(name) if line[0] <= 5] for name in ("one", "two"))
    assert first == second != []


@pytest.fixture
def losing(monkeypatch):
    """Loses a rank in the given calls of ``Loop.iterate``, counted over all starts."""

    def lose(*calls: int) -> None:
        count = itertools.count(1)
        iterate = Loop.iterate

        def lost(self):
            if next(count) in calls:
                raise RankFailed("Rank 1 is lost.")
            return iterate(self)

        monkeypatch.setattr(Loop, "iterate", lost)

    return lose


def test_ranks_may_be_lost_again_and_again_if_the_run_gets_further(run, losing):
    run("name=plain", "iterations=4")
    losing(1, 2, 5, 6)
    said = run("name=lost", "iterations=4", "save_every=1")
    assert said.count("Rank 1 is lost.\nAll ranks start again, from the last saved state") == 4
    assert sampled("lost") == sampled("plain") != []


def test_a_run_that_loses_ranks_and_gets_nowhere_ends(run, losing):
    losing(2, 4, 6)  # Each start does an iteration, and no state is saved behind it.
    with pytest.raises(RankFailed, match=r"^Rank 1 is lost.\n.* continue with --resume$"):
        run("name=stuck", "iterations=9", "save_every=9")
    run("name=stuck", "iterations=9")
    assert [one.iteration for one in iterations("stuck")] == [*range(1, 10)]
