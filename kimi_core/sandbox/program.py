"""What a run in the sandbox is given and gives back."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MB = 1 << 20
LEAST_MEMORY = 16 * MB


class Status(StrEnum):
    """How a run ended. The sandbox itself never says WRONG: that is the verdict of its caller."""

    OK = "OK"
    """The program exited with 0."""
    WRONG = "WRONG"
    """It exited with 0 and its output is not what was asked for."""
    RUNTIME = "RUNTIME"
    """It exited with another code, or by a signal."""
    TIME = "TIME"
    """It reached its limit of wall-clock or CPU time."""
    MEMORY = "MEMORY"
    """It reached its limit of memory."""
    OUTPUT = "OUTPUT"
    """It wrote more than the limit to stdout or to stderr."""
    INFRA = "INFRA"
    """The sandbox failed, not the program: nothing is known of it. Retry, never score as wrong."""


@dataclass(frozen=True)
class Limits:
    """What one run may use. Times count from the start of the program, not of the sandbox.

    Raises:
        ValueError: a limit that is not positive and finite.
    """

    wall_s: float = 10.0
    cpu_s: float = 5.0
    """Of all processes of the run together; without a cgroup, of each."""
    memory_bytes: int = 512 * MB
    """Of all processes and files together; without a cgroup, see docs/sandbox.md."""
    processes: int = 32
    """Processes and threads at a time."""
    file_bytes: int = 16 * MB
    """Of one file that the program writes."""
    open_files: int = 64
    output_bytes: int = 64 << 10
    """Kept of stdout, and as much of stderr. What is written beyond is read and thrown away."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Limits: {name} = {value!r}; allowed is any positive number")
        if self.memory_bytes < LEAST_MEMORY:
            raise ValueError(
                f"Limits: memory_bytes = {self.memory_bytes}; an interpreter needs {LEAST_MEMORY}"
            )


@dataclass(frozen=True)
class Result:
    """How a run ended and what it used."""

    status: Status
    exit_code: int | None
    """128 + n when signal n ended the program, as in a shell; None when it was killed from
    outside or never started."""
    stdout: bytes
    """At most ``limits.output_bytes``, as ``stderr``."""
    stderr: bytes
    cpu_s: float
    wall_s: float
    memory_bytes: int
    """The peak of all processes together; without a cgroup, of the largest."""
    detail: str = ""
    """Which limit was reached or what failed, in words."""

    def as_json(self) -> dict[str, Any]:
        """Values that ``json.dumps`` takes; bytes that are not UTF-8 become U+FFFD."""
        values = asdict(self)
        for stream in ("stdout", "stderr"):
            values[stream] = values[stream].decode(errors="replace")
        return values


class SandboxUnavailable(RuntimeError):
    """Programs cannot be run safely here; the message names what is missing and the way out."""
