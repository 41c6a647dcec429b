"""Programs and results as JSON, for the service and its client. Bytes travel in base64.

``PROGRAM.dump_python(program, mode="json")`` and ``PROGRAM.validate_json(body)`` are the two
directions; the others work in the same way.
"""

from dataclasses import dataclass

from pydantic import TypeAdapter

from kimi_core.sandbox.program import Program, Result


@dataclass(frozen=True)
class Batch:
    """Several programs that a service runs in parallel; at least one."""

    runs: list[Program]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("A batch of 0 runs; allowed is 1 or more")


PROGRAM = TypeAdapter(Program)
BATCH = TypeAdapter(Batch)
RESULT = TypeAdapter(Result)
