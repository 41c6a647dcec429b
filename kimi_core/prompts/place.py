"""Where a line stands, for errors."""

from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where a line stands. It becomes text only if there is an error."""

    path: Path
    number: int
    """Counted from 1."""

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"
