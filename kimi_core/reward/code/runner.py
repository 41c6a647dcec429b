"""Runs programs in a sandbox: repeats a run if the sandbox fails, and compiles C++.

A sandbox is ``kimi_core.sandbox.run`` or the same method of a pool or of a service's client.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kimi_core.config import SandboxConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code.problem import Language
from kimi_core.sandbox import Limits, Pool, Result, SandboxUnavailable, Status, compile_cpp
from kimi_core.sandbox.program import TOKEN_VARIABLE

if TYPE_CHECKING:
    from kimi_core.sandbox.client import SandboxClient


class Run(Protocol):
    """Runs one program in a fresh sandbox. Called from several threads at the same time."""

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
    """A program that is ready to run: Python source, or a command with its files."""

    program: str | Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Runner:
    """A sandbox whose failures are retried once and then raised.

    Args:
        sandbox: runs the programs.
    """

    def __init__(self, sandbox: Run) -> None:
        self._sandbox = sandbox

    def run(
        self,
        program: str | Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        """Run a program in a fresh sandbox; the result is never ``Status.INFRA``.

        Raises:
            InfrastructureError: the sandbox failed twice, or is unavailable.
        """
        done: Result | None = None
        for _ in range(2):
            try:
                done = self._sandbox(program, stdin=stdin, files=files, limits=limits)
            except SandboxUnavailable as error:
                raise InfrastructureError(str(error)) from error
            if done.status is not Status.INFRA:
                return done
        assert done is not None
        raise InfrastructureError(f"The sandbox failed twice: {last_words(done)}")

    def build(self, source: str, language: Language) -> Executable | Result:
        """Make a program ready. C++ is compiled in a sandbox; a failure gives the result of g++.

        Raises:
            InfrastructureError: the sandbox failed twice, or has no g++.
        """
        if language == "python":
            return Executable(source)
        done = compile_cpp(source, run=self.run)
        if done.exit_code in (126, 127):
            raise InfrastructureError("No g++ in the sandbox: apt-get install g++ on its host")
        return Executable(["./main"], {"main": done.stdout}) if done.status is Status.OK else done

    def execute(self, executable: Executable, *, stdin: bytes, limits: Limits) -> Result:
        """Run what ``build`` made. Raises as ``run``."""
        return self.run(executable.program, stdin=stdin, files=executable.files, limits=limits)


def last_words(done: Result) -> str:
    """The last line of standard error, otherwise the sandbox's detail; 200 characters at most."""
    words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return (words or done.detail or f"exit code {done.exit_code}")[:200]


def open_sandbox(config: SandboxConfig) -> "Pool | SandboxClient":
    """Open the sandbox that a config names; the caller closes it.

    Raises:
        ValueError: programs cannot be run safely here, or the service does not answer.
    """
    try:
        if not config.url:
            return Pool(config.slots, allow_weak=config.allow_weak)
        from kimi_core.sandbox.client import SandboxClient  # The pool needs no HTTP.

        client = SandboxClient(config.url, token=os.environ.get(TOKEN_VARIABLE) or None)
        client.health()
        return client
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'kimi-core[sandbox]'") from None
    except SandboxUnavailable as error:
        raise ValueError(str(error)) from error


def limits_of(config: SandboxConfig) -> Limits:
    """What a program may use on one test."""
    return Limits(
        cpu_s=config.time_s, wall_s=2 * config.time_s, memory_bytes=config.memory_mb << 20
    )
