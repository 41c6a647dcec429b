"""Runs and results as JSON, for the service and its client. Bytes travel in base64."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kimi_core.sandbox.program import Limits, Result, Status

TOKEN_VARIABLE = "KIMI_SANDBOX_TOKEN"
"""The environment variable that the service and the trainer read the bearer token from; a config
would be written into the run folder, a command line is seen by everybody on the host."""


@dataclass(frozen=True)
class RunRequest:
    """One run: the arguments of ``kimi_core.sandbox.run``.

    >>> request = RunRequest("print(input())", stdin=b"hi")
    >>> RunRequest.from_json(request.as_json()) == request
    True
    """

    program: str | Sequence[str]
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def as_json(self) -> dict[str, Any]:
        return {
            "program": self.program if isinstance(self.program, str) else list(self.program),
            "stdin": b64encode(self.stdin).decode(),
            "files": {name: b64encode(content).decode() for name, content in self.files.items()},
            "limits": asdict(self.limits),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunRequest":
        """Raises ValueError or TypeError for what ``as_json`` never gives."""
        return cls(
            program=values["program"],
            stdin=b64decode(values["stdin"], validate=True),
            files={name: b64decode(text, validate=True) for name, text in values["files"].items()},
            limits=Limits(**values["limits"]),
        )


def result_to_json(result: Result) -> dict[str, Any]:
    """A result whose bytes survive, unlike those of ``Result.as_json``, which is for reading."""
    streams = {name: b64encode(getattr(result, name)).decode() for name in ("stdout", "stderr")}
    return asdict(result) | streams


def result_from_json(values: Mapping[str, Any]) -> Result:
    """What ``result_to_json`` was given.

    Raises:
        ValueError, KeyError, TypeError: the values are no such thing.
    """
    streams = {name: b64decode(values[name], validate=True) for name in ("stdout", "stderr")}
    return Result(**{**values, **streams, "status": Status(values["status"])})
