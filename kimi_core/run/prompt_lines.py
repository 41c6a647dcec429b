"""``prompts.jsonl``: what the curriculum knows of each prompt over time, for the dashboard.

A run does not read it. ``docs/metrics.md`` describes the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from kimi_core.prompts.curriculum import Curriculum
from kimi_core.run.files import write_atomically
from kimi_core.types import Group

TEXT_SHOWN = 100
"""Characters of a prompt in ``prompts.jsonl``."""


class PromptLines:
    """A line for each prompt after every iteration that trained it.

    Lines of iterations after ``start_iteration`` are removed: those iterations run a second time.
    """

    def __init__(self, folder: Path, *, start_iteration: int = 0) -> None:
        self._path = folder / "prompts.jsonl"
        if self._path.is_file():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, start_iteration)]
            write_atomically(self._path, "".join(kept))

    def write(self, iteration: int, groups: Sequence[Group], curriculum: Curriculum) -> None:
        """Append a line for each prompt that an iteration trained.

        Raises:
            OSError: the disk is full or has another fault.
        """
        lines = []
        for group in groups:
            prompt, standing = group.prompt, curriculum.standing(group.prompt.id, iteration)
            line = {
                "iteration": iteration,
                "prompt_id": prompt.id,
                "prompt": prompt.text[:TEXT_SHOWN],
                "responses": len(group.correctness),
                "correctness": round(float(group.correctness.mean()), 6),
                **{name: round(value, 6) for name, value in vars(standing).items()},
            }
            lines.append(json.dumps(line, separators=(",", ":")) + "\n")
        with self._path.open("a") as file:  # Not forced to disk: a lost line is lost to a viewer.
            file.write("".join(lines))


def _is_kept(line: str, start_iteration: int) -> bool:
    """Whether the line is whole and of an iteration that is done."""
    try:
        return line.endswith("\n") and json.loads(line)["iteration"] <= start_iteration
    except (ValueError, KeyError, TypeError):
        return False
