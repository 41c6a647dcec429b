"""Where a prompt stands, for errors."""

from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where a line or a row stands. It becomes text only if there is an error."""

    path: str | Path
    number: int
    """Counted from 1."""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"
