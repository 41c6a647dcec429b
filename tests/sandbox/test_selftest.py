"""The self-test: it passes where all holds, names what does not, and a pool refuses then."""

import dataclasses
import subprocess
import sys

import pytest

from kimi_core.sandbox import (
    Pool,
    Result,
    SandboxUnavailable,
    Status,
    bubblewrap,
    check,
    run,
    selftest,
)
from kimi_core.sandbox.selftest import examine


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bubblewrap on this machine."""
    bubblewrap.find_bwrap.cache_clear()
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda *_, **__: None)
    yield
    bubblewrap.find_bwrap.cache_clear()


def test_all_protections_hold_as_root(bwrap: None, weak: bool) -> None:
    report = check()
    wrong = {one.name for one in report.missing} - (
        {"memory of all processes together"} if weak else set()
    )
    assert not wrong, str(report)
    assert len(report.protections) >= 13


def test_without_bubblewrap_the_way_out_is_named(hidden: None) -> None:
    for start in (lambda: Pool(1), lambda: Pool(1, allow_weak=True)):
        with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
            start()
    report = check()
    assert "MISSING  a sandbox: bubblewrap is not installed" in str(report)


def test_a_missing_protection_is_refused_unless_allowed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_examine", lambda _: examine(pool.run, ["no cgroup at all"]))
    with pytest.raises(SandboxUnavailable, match="no cgroup at all") as caught:
        Pool(1)
    assert "allow_weak=True" in str(caught.value)
    with Pool(1, allow_weak=True) as weak_pool:
        assert weak_pool.run("print(1)").stdout == b"1\n"


@pytest.mark.parametrize(
    ("program", "status", "name"),
    [
        ("SIG_IGN", Status.OK, "wall clock"),
        ("'x' * 1000", Status.OK, "output"),
        ("bytearray", Status.OK, "memory of all processes together"),
        ("os.fork", Status.TIME, "limit of processes"),
    ],
)
def test_each_check_can_fail(pool: Pool, program: str, status: Status, name: str) -> None:
    """One limit is taken to have failed."""

    def run(source: str, **kwargs: object) -> Result:
        if program in source and "/proc/self/status" not in source:
            return Result(status, 0, b"", b"", 0.0, 0.0, 0)
        return pool.run(source, **kwargs)

    missing = {one.name for one in examine(run, []).missing}
    assert name in missing


def test_the_probe_reports_a_bare_process(pool: Pool) -> None:
    """Outside of any sandbox its checks fail, which shows that they can."""
    out = subprocess.run([sys.executable, "-c", selftest._PROBE], capture_output=True, check=True)
    seen = dataclasses.replace(pool.run("pass"), stdout=out.stdout)
    missing = {one.name for one in examine(lambda *_, **__: seen, ["x"]).missing}
    assert missing >= {
        "system-call filter",
        "no network",
        "host files hidden",
        "folders of limited size",
        "empty environment",
        "own process namespace",
    }


def test_the_default_pool_runs_programs(bwrap: None, weak: bool) -> None:
    assert run("print(input())", stdin=b"x", allow_weak=weak).stdout == b"x\n"
