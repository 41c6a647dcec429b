"""``--from N``: a run goes back to a kept state, and what came after it is set aside.

``runs/NAME/aside/1/`` then holds the later lines of metrics.jsonl, files of ``trajectories/`` and
``samples/``, states, and the best checkpoint if it is a later one. Nothing reads that folder; it
may be removed.

Records are moved first, then states, and metrics.jsonl is cut last. A process that dies in between
has lost nothing, and the same command finishes the work.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from kimi_core.metrics import read_lines
from kimi_core.run.best import read_best
from kimi_core.run.files import sync, write_atomically
from kimi_core.run.folder import BEST, RunFolder


def go_back(folder: RunFolder, number: int) -> str:
    """Make the state of ``number`` the newest one. Returns what to say.

    If the run has gone back there before with the settings that it is given now, nothing is done:
    the same bits would come again, and a job that is restarted by the same command has to get on.

    Raises:
        ValueError: there is no such state, or it is damaged.
        OSError: something could not be moved.
    """
    if folder.states.numbered(number) is None:
        kept = ", ".join(map(str, folder.states.numbers())) or "none"
        raise ValueError(
            f"{folder.path} has no state of iteration {number} to go back to; it has {kept}. "
            "keep_states keeps more of them"
        )
    path = folder.path / "metrics.jsonl"
    lines = read_lines(path)
    been_there = [one for _, one in lines if one.get("back_from") and one["iteration"] == number]
    if been_there and not folder.changed:
        return f"the run has gone back to {number} with these settings before, and continues"
    later = [(line, record) for line, record in lines if record["iteration"] > number]
    newest = max(folder.states.numbers())
    if not later and newest == number:
        return ""
    aside = _new_folder(folder.path / "aside")
    (aside / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in later))
    for name in ("trajectories", "samples"):
        files = (folder.path / name).glob("*")
        _move([one for one in files if _number(one) > number], aside / name)
    if (rates := folder.path / "prompts.jsonl").is_file():
        shutil.copy(rates, aside)  # Its later lines are cut when the run is opened.
    if (best := read_best(folder.path)) and best.iteration > number:
        (folder.path / BEST).rename(aside / BEST)
    folder.buffer.unlink(missing_ok=True)  # The state has a snapshot.
    states = [one for one in folder.states.folder.iterdir() if _number(one) > number]
    _move(sorted(states, reverse=True), aside / "states")  # The newest first: all before are whole.
    lost_s = sum(_seconds(record) for _, record in later)
    last = {"kind": "resume", "iteration": number, "lost_s": lost_s, "back_from": newest}
    earlier = [line for line, record in lines if record["iteration"] <= number]
    earlier.append(json.dumps(last).encode())
    write_atomically(path, b"".join(line + b"\n" for line in earlier))
    return f"back to the state of {number}; what came after it is in {aside}"


def _new_folder(above: Path) -> Path:
    above.mkdir(exist_ok=True)
    folder = above / str(1 + max((int(one.name) for one in above.iterdir()), default=0))
    folder.mkdir()
    return folder


def _move(paths: list[Path], into: Path) -> None:
    if paths:
        into.mkdir()
    for path in paths:
        path.rename(into / path.name)
        sync(path.parent)


def _number(path: Path) -> int:
    stem = path.name.partition(".")[0]
    return int(stem) if stem.isdigit() else -1


def _seconds(record: dict[str, Any]) -> float:
    return record.get("wall_s") or record.get("lost_s") or 0.0
