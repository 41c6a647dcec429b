"""The self-test: tries forbidden things in a sandbox, and says which protections hold."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_core.sandbox.program import MB, Limits, Result, SandboxUnavailable, Status

_PROBE = (Path(__file__).with_name("inside") / "probe.py").read_text()
_SLEEP = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
_FORKS = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except BlockingIOError:
    os.write(1, str(count).encode())
"""
_MEMORY = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(b"x") * (24 << 20)
        time.sleep(60)
time.sleep(60)
"""


@dataclass(frozen=True)
class Protection:
    name: str
    holds: bool
    detail: str = ""
    """If the protection does not hold: what was seen, and what to do."""


@dataclass(frozen=True)
class SelfTest:
    """The result of the self-test."""

    protections: tuple[Protection, ...]

    @property
    def missing(self) -> tuple[Protection, ...]:
        return tuple(one for one in self.protections if not one.holds)

    def require(self) -> None:
        """Raise SandboxUnavailable if a protection is missing."""
        if self.missing:
            found = "; ".join(f"{one.name}: {one.detail}" for one in self.missing)
            raise SandboxUnavailable(
                f"The sandbox is weak here, so it scores nothing ({found}). allow_weak=True runs "
                "programs nevertheless; docs/sandbox.md says what that risks."
            )

    def __str__(self) -> str:
        lines = [
            f"{'holds  ' if one.holds else 'MISSING'}  {one.name}"
            + (f": {one.detail}" if one.detail else "")
            for one in self.protections
        ]
        return "\n".join(lines)


def examine(run: Callable[..., Result], missing: Sequence[str]) -> SelfTest:
    """Test each protection.

    Args:
        run: ``run`` of a Pool.
        missing: what the slots of the pool lack.
    """

    def run_twice(program: str, *, limits: Limits) -> Result:
        """Try once more if the sandbox failed, because that says nothing about a protection."""
        seen = run(program, limits=limits)
        return run(program, limits=limits) if seen.status is Status.INFRA else seen

    seen = run_twice(_PROBE, limits=Limits(wall_s=30))
    if seen.status is not Status.OK:
        said = f"{seen.detail} {seen.stderr.decode(errors='replace')}"
        return SelfTest((Protection("a sandbox", False, said.strip()),))
    found = [Protection(name, not wrong, wrong) for name, wrong in json.loads(seen.stdout).items()]
    others = (
        _processes(run_twice),
        _memory(run_twice, missing),
        _wall_clock(run_twice),
        _output(run_twice),
    )
    return SelfTest((*found, *others))


def _how(seen: Result) -> str:
    return f"{seen.status} ({seen.detail})" if seen.detail else str(seen.status)


def _processes(run: Callable[..., Result]) -> Protection:
    seen = run(_FORKS, limits=Limits(wall_s=10, processes=8))
    holds = seen.stdout.isdigit() and int(seen.stdout) < 8
    return Protection(
        "limit of processes", holds, "" if holds else f"{seen.stdout!r} of 8 started: {_how(seen)}"
    )


def _memory(run: Callable[..., Result], missing: Sequence[str]) -> Protection:
    name = "memory of all processes together"
    if missing:
        wayout = (
            "run as root, or in a delegated cgroup v2: systemd-run --user --scope -p Delegate=yes"
        )
        return Protection(name, False, f"{'; '.join(missing)}. {wayout}")
    seen = run(_MEMORY, limits=Limits(wall_s=10, memory_bytes=64 * MB))
    holds = seen.status is Status.MEMORY
    return Protection(name, holds, "" if holds else f"96 MB in 64 MB: {_how(seen)}")


def _wall_clock(run: Callable[..., Result]) -> Protection:
    seen = run(_SLEEP, limits=Limits(wall_s=0.2))
    holds = seen.status is Status.TIME and seen.wall_s < 10
    return Protection("wall clock", holds, "" if holds else f"{_how(seen)} in {seen.wall_s:g} s")


def _output(run: Callable[..., Result]) -> Protection:
    seen = run("while True: print('x' * 1000)", limits=Limits(output_bytes=1000))
    holds = seen.status is Status.OUTPUT and len(seen.stdout) == 1000
    return Protection("output", holds, "" if holds else f"{_how(seen)}, {len(seen.stdout)} bytes")
