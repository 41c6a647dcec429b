"""Running programs in whichever sandbox there is: repeated when the sandbox fails, C++ compiled.

A sandbox is ``kimi_core.sandbox.run`` or the same method of a pool or of a service's client.
"""

import atexit
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kimi_core.config import SandboxConfig
from kimi_core.reward.function import InfrastructureError
from kimi_core.reward.program import Language
from kimi_core.sandbox import Limits, Pool, Result, SandboxUnavailable, Status
from kimi_core.sandbox.wire import TOKEN_VARIABLE

COMPILE = (
    "PATH=/usr/bin:/bin; export PATH; command -v g++ >&2 || exit 127; "
    "g++ -std=c++17 -O2 -pipe -s -o program program.cc >&2 && cat program"
)
COMPILE_LIMITS = Limits(
    wall_s=60.0, cpu_s=30.0, memory_bytes=1 << 30, file_bytes=16 << 20, output_bytes=16 << 20
)


class Run(Protocol):
    """Runs one program in a sandbox of its own. Called from several threads at once."""

    def __call__(
        self,
        program: str | Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Result: ...


@dataclass(frozen=True)
class Executable:
    """A program that is ready to be run: Python source, or a command and the files it needs."""

    program: str | Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Runner:
    """A sandbox whose failures are retried once and then raised.

    Args:
        run: the sandbox.
    """

    def __init__(self, run: Run) -> None:
        self._sandbox = run

    def run(
        self, executable: Executable, *, stdin: bytes = b"", limits: Limits | None = None
    ) -> Result:
        """Run it once, in a fresh sandbox; never gives ``Status.INFRA``.

        Raises:
            InfrastructureError: the sandbox failed twice, or is not there.
        """
        done: Result | None = None
        for _ in range(2):
            try:
                done = self._sandbox(
                    executable.program, stdin=stdin, files=executable.files, limits=limits
                )
            except SandboxUnavailable as error:
                raise InfrastructureError(str(error)) from error
            if done.status is not Status.INFRA:
                return done
        assert done is not None
        raise InfrastructureError(f"The sandbox failed twice: {last_words(done)}")

    def build(self, source: str, language: Language) -> Executable | Result:
        """Make a program ready: C++ is compiled, in a sandbox; a failure gives g++'s result.

        Raises:
            InfrastructureError: the sandbox failed twice, or has no g++.
        """
        if language == "python":
            return Executable(source)
        compiler = Executable(["/bin/sh", "-c", COMPILE], {"program.cc": source.encode()})
        done = self.run(compiler, limits=COMPILE_LIMITS)
        if done.exit_code in (126, 127):
            raise InfrastructureError("No g++ in the sandbox: apt-get install g++ on its host")
        if done.status is Status.OK:
            return Executable(["./program"], {"program": done.stdout})
        return done


def last_words(done: Result) -> str:
    """The last line of standard error, or what the sandbox says; at most a line's length."""
    words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return (words or done.detail or f"exit code {done.exit_code}")[:200]


def open_sandbox(config: SandboxConfig) -> Run:
    """The sandbox that a config names, open until this process ends.

    Raises:
        ValueError: programs cannot be run safely here, or the service does not answer.
    """
    try:
        if config.url:
            # Here, as the pool needs no HTTP.
            from kimi_core.sandbox.client import SandboxClient

            client = SandboxClient(config.url, token=os.environ.get(TOKEN_VARIABLE) or None)
            client.health()
            return client.run
        pool = Pool(config.slots, allow_weak=config.allow_weak)
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from error
    atexit.register(pool.close)
    return pool.run


def limits_of(config: SandboxConfig) -> Limits:
    """What a program may use on one test."""
    return Limits(
        cpu_s=config.time_s, wall_s=2 * config.time_s, memory_bytes=config.memory_mb << 20
    )
