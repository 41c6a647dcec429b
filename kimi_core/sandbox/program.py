"""A program for the sandbox, its limits, and how it ended."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

MB = 1 << 20
LEAST_MEMORY = 16 * MB

TOKEN_VARIABLE = "KIMI_SANDBOX_TOKEN"
"""Environment variable with the bearer token of the service. A config would be written into the run
folder, and everybody on a host can see a command line."""

JSON_FORMAT = {"ser_json_bytes": "base64", "val_json_bytes": "base64", "extra": "forbid"}
"""How ``protocol.py`` writes and reads these classes. It is a plain dict, because the process of a
slot must not load pydantic."""


class Status(StrEnum):
    """How a program ended. Only callers set WRONG, never the sandbox."""

    OK = "OK"
    """The program exited with 0."""
    WRONG = "WRONG"
    """It exited with 0, and its output is not the expected one."""
    RUNTIME = "RUNTIME"
    """It exited with another code, or by a signal."""
    TIME = "TIME"
    """It reached its limit of wall-clock or CPU time."""
    MEMORY = "MEMORY"
    """It reached its limit of memory."""
    OUTPUT = "OUTPUT"
    """It wrote more than the limit to stdout or to stderr."""
    INFRA = "INFRA"
    """The sandbox failed, not the program. Retry, and never score the program as wrong."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Times count from the start of the program, not of the sandbox.

    Raises:
        ValueError: a limit is not positive and finite.
    """

    wall_s: float = 10.0
    """Without the time that the program could have run but no core was free."""
    cpu_s: float = 5.0
    """CPU time of all processes together; without a cgroup, of each."""
    memory_bytes: int = 512 * MB
    """Memory of all processes and files together; without a cgroup, see docs/sandbox.md."""
    processes: int = 32
    """Processes and threads at the same time."""
    file_bytes: int = 16 * MB
    """Size of one file that the program writes."""
    open_files: int = 64
    output_bytes: int = 64 << 10
    """Bytes kept of stdout, and of stderr. The rest is read and thrown away."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Limits: {name} = {value!r}; allowed is any positive number")
        if self.memory_bytes < LEAST_MEMORY:
            raise ValueError(
                f"Limits: memory_bytes = {self.memory_bytes}; an interpreter needs {LEAST_MEMORY}"
            )


@dataclass(frozen=True)
class Program:
    """A program with everything that it is given.

    Raises:
        ValueError: the command is empty, or a file name leaves the work folder.
    """

    program: str | Sequence[str]
    """Python source, or a command as a list. A command finds the host's ``/usr``."""
    stdin: bytes = b""
    """Bytes that the program reads; then its stdin ends."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name → content. They are put into the work folder, where the program starts; all are
    executable."""
    limits: Limits = field(default_factory=Limits)

    __pydantic_config__: ClassVar[dict[str, str]] = JSON_FORMAT

    def __post_init__(self) -> None:
        if isinstance(self.program, str):
            if "main.py" in self.files:
                raise ValueError("File name 'main.py'; the program has it, so allowed is any other")
        elif not self.program or not self.program[0] or not all(map(_passable, self.program)):
            raise ValueError(f"Command {self.program!r}; allowed is a program and its arguments")
        for name in self.files:
            parts = name.split("/")
            if not {"", ".", ".."}.isdisjoint(parts) or "\n" in name or not _passable(name):
                raise ValueError(f"File name {name!r}; allowed is a path inside the work folder")

    @property
    def is_python(self) -> bool:
        return isinstance(self.program, str)


def _passable(text: str) -> bool:
    """Whether the text can be handed to the kernel."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Result:
    """How a program ended and what it used."""

    status: Status
    exit_code: int | None
    """128 + n if signal n ended the program, as in a shell; None if the program was killed from
    outside or never started."""
    stdout: bytes
    """At most ``limits.output_bytes``; the same for ``stderr``."""
    stderr: bytes
    cpu_s: float
    wall_s: float
    memory_bytes: int
    """Peak of all processes together; without a cgroup, of the largest."""
    detail: str = ""
    """The limit that was reached, or what failed."""

    __pydantic_config__: ClassVar[dict[str, str]] = JSON_FORMAT

    def as_json(self) -> dict[str, Any]:
        """Values for ``json.dumps``; bytes that are not UTF-8 become U+FFFD."""
        values = asdict(self)
        for stream in ("stdout", "stderr"):
            values[stream] = values[stream].decode(errors="replace")
        return values


class SandboxUnavailable(RuntimeError):
    """Programs cannot be run safely here; the message says what is missing and what to do."""
