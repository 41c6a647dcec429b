"""Ranks that see neither the run's folder nor its processes: as on another host."""

import subprocess
import sys
from pathlib import Path

import pytest
from rewarded_runs import go_on, iterations, sampled, write_files

from kimi_core.trainer.ranks import Ranks

APART = """#!/bin/sh
exec unshare --user --map-root-user --pid --mount --fork --kill-child --mount-proc \\
    sh -c 'mount -t tmpfs none runs && exec "$@"' sh {python} "$@"
"""
"""In place of Python: in processes and file systems of its own."""


@pytest.fixture
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    Path("runs").mkdir()
    python = tmp_path / "python"
    python.write_text(APART.format(python=sys.executable))
    python.chmod(0o700)
    tried = subprocess.run([python, "-c", ""], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine allows no namespaces: {tried.stderr}")
    return python


@pytest.fixture
def far(monkeypatch):
    """Which ranks were far, at each meeting."""
    met = []
    meet = Ranks.meet.__func__
    monkeypatch.setattr(
        Ranks,
        "meet",
        classmethod(lambda cls, *given, **named: met.append(meet(cls, *given, **named)) or met[-1]),
    )
    return lambda: [one.far for one in met]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings", [["trainer.ranks=3"], ["trainer.ranks=2", "trainer.tensor_parallel=2"]]
)
def test_a_run_whose_ranks_are_on_other_hosts(apart, far, monkeypatch, settings):
    ranks = int(settings[0][-1])
    go_on("name=plain", "iterations=6", "trainer.learning_rate=1e-4")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(apart))
        for last in (3, 6):  # With a state that is loaded.
            go_on("name=far", f"iterations={last}", "trainer.learning_rate=1e-4", *settings)
    assert far() == [list(range(1, ranks))] * 2
    assert sampled("far") == sampled("plain") != []
    for one, two in zip(iterations("far"), iterations("plain"), strict=True):
        assert one.loss == pytest.approx(two.loss, abs=1e-5, nan_ok=True)
    assert iterations("far")[-1].loss == pytest.approx(iterations("plain")[-1].loss, abs=1e-5)
    go_on("name=far", "iterations=8", "trainer.learning_rate=1e-4")  # Nobody is far, nor a rank.
    assert len(iterations("far")) == 8


@pytest.mark.nightly
def test_near_and_far_ranks_write_the_same_bytes(apart, far, monkeypatch):
    """Of the same two ranks, once near and once far, every file is the same."""
    for name, python in (("near", sys.executable), ("far", str(apart))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", python)
            go_on(f"name={name}", "iterations=2", "trainer.ranks=2")
    assert far() == [[], [1]]
    files = sorted(one.relative_to("runs/near") for one in Path("runs/near").rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert Path("runs/far", file).read_bytes() == Path("runs/near", file).read_bytes(), file
