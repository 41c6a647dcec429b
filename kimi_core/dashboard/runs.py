"""What the pages ask of run folders. Each answer is a value that JSON allows.

``Runs`` finds the folders, and a ``Run`` reads one. A name or number that somebody asks for is
looked up among what was found. It never becomes part of a path.
"""

import tomllib
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from kimi_core.dashboard.follow import Follower
from kimi_core.dashboard.locks import is_locked
from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.pictures import picture
from kimi_core.dashboard.responses import IterationFile
from kimi_core.dashboard.tokens import token_texts
from kimi_core.dashboard.waiting import waiting, waiting_response
from kimi_core.metrics import accuracy_in, is_stuck

TRACES = ("config.toml", "metrics.jsonl")
"""A folder with one of these is a run."""

DEPTH = 3
"""Levels of folders below the one given in which runs are looked for."""

FILES_KEPT = 64
"""Indexed trajectory files that a run keeps in memory, the last ones used."""

ETA_ITERATIONS = 10
"""Iterations whose mean time gives the time left, as in the progress line of a run."""


class Runs:
    """The runs at and below a folder. New ones are found at every look.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder: give the folder of a run, or one that has runs in it, "
                "such as runs/"
            )
        self.folder = folder
        self._runs: dict[str, Run] = {}
        self._lock = Lock()

    def all(self) -> list["Run"]:
        """Every run, by name."""
        found = {path.resolve().name if name == "." else name: path for name, path in self._find()}
        with self._lock:
            self._runs = {
                name: self._runs.get(name) or Run(name, path) for name, path in found.items()
            }
            return [self._runs[name] for name in sorted(self._runs)]

    def run(self, name: str) -> "Run":
        """The run of that name.

        Raises:
            Missing: there is none.
        """
        found = self._runs.get(name) or next((r for r in self.all() if r.name == name), None)
        if found is None:
            raise Missing(f"There is no run {name!r} in {self.folder}")
        return found

    def summary(self) -> dict[str, Any]:
        """What the page of all runs shows."""
        return {"folder": str(self.folder), "runs": [run.summary() for run in self.all()]}

    def _find(self) -> list[tuple[str, Path]]:
        """Name and path of every run, without looking into runs' own folders of states."""
        found, level = [], [self.folder]
        for _ in range(DEPTH + 1):
            below = []
            for folder in level:
                if any((folder / trace).is_file() for trace in TRACES):
                    found.append((folder.relative_to(self.folder).as_posix(), folder))
                below += _folders_in(folder)
            level = below
        return found


class Run:
    """Reads one run folder. Any thread may ask; what was read is kept while the file is the same.

    Raises by every method:
        Missing: what was asked for is not there.
        OSError, ValueError: a file is there and cannot be read.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._metrics = Follower(path / "metrics.jsonl")
        self._prompts = Follower(path / "prompts.jsonl")
        self._files: OrderedDict[tuple[int, int, int], IterationFile] = OrderedDict()
        self._lock = Lock()

    def summary(self) -> dict[str, Any]:
        """State, progress, and accuracy before and after."""
        try:
            settings, error = self.settings(), ""
        except (OSError, ValueError) as fault:
            settings, error = {}, f"config.toml cannot be read: {fault}"
        lines = self._metrics.read()
        iterations = [line for line in lines if line.get("kind") == "iteration"]
        evaluations = [line for line in lines if line.get("kind") == "evaluation"]
        last = iterations[-1] if iterations else {}
        done, total = last.get("iteration", 0), settings.get("iterations")
        enough = settings.get("samples")
        is_done = bool(total and done >= total) or bool(
            enough and last.get("samples_trained_total", 0) >= enough
        )
        if patience := settings.get("evaluation.patience"):
            best = settings.get("evaluation.best", "")
            is_done |= is_stuck([accuracy_in(one, best) for one in evaluations], patience)
        running = is_locked(self.path / "lock")
        return {
            "name": self.name,
            "state": "running" if running else "finished" if is_done else "stopped",
            "iteration": done,
            "iterations": total,
            "eta_s": _eta_s(iterations, total) if running else None,
            "wall_s": sum(line.get("wall_s") or 0.0 for line in iterations + evaluations),
            "before": evaluations[0] if evaluations else None,
            "after": evaluations[-1] if len(evaluations) > 1 else None,
            "curve": [(line.get("iteration"), line.get("accuracy_sampled")) for line in iterations],
            "samples_trained": last.get("samples_trained_total", 0),
            "model": settings.get("model.name"),
            "task": settings.get("prompts.source"),
            "updated": _changed_s(self.path / "metrics.jsonl", self.path / "buffer.bin"),
            "has_buffer": (self.path / "buffer.bin").is_file(),
            "broken_lines": self._metrics.broken,
            "error": error,
        }

    def settings(self) -> dict[str, Any]:
        """Dotted key → value, as in ``config.toml``; empty if there is none."""
        path = self.path / "config.toml"
        return _flat(tomllib.loads(path.read_text())) if path.is_file() else {}

    def metrics(self, epoch: int = -1, after: int = 0) -> dict[str, Any]:
        """The lines of ``metrics.jsonl`` behind the first ``after``.

        Args:
            epoch: that of the last answer. After ``--resume`` it is another, and all lines come.
        """
        lines = self._metrics.read()
        start = after if epoch == self._metrics.epoch else 0
        return {
            "epoch": self._metrics.epoch,
            "start": start,
            "lines": lines[start:],
            "broken_lines": self._metrics.broken,
        }

    def iterations(self) -> list[int]:
        """Iterations whose responses were written, in order."""
        found = (self.path / "trajectories").glob("*.jsonl")
        return sorted(int(path.stem) for path in found if path.stem.isdecimal())

    def iteration(self, number: int) -> dict[str, Any]:
        """Rewards, groups and ages of an iteration."""
        return self._file(number).summary()

    def group(self, number: int, group_id: int) -> dict[str, Any]:
        """The responses of one group, without their tokens."""
        return self._file(number).group(group_id)

    def response(self, number: int, trajectory_id: int) -> dict[str, Any]:
        """One response with the text of each token, where the run has a tokenizer."""
        record = self._file(number).response(trajectory_id)
        # The prompt goes first: a tokenizer may drop a space at the start of a text.
        before, ids = record.get("prompt_ids", []), record.get("token_ids", [])
        texts = token_texts(self.path / "tokenizer.json", before + ids) if ids else None
        return record | {"token_texts": texts and texts[len(before) :]}

    def picture(self, digest: str) -> bytes:
        """The PNG of an image of a prompt, by its SHA-256."""
        return picture(self.path, digest)

    def waiting(self) -> dict[str, Any]:
        """What is in the buffer now."""
        return waiting(self.path)

    def waiting_response(self, trajectory_id: int) -> dict[str, Any]:
        """One response that is in the buffer now."""
        return waiting_response(self.path, trajectory_id)

    def prompts(self) -> dict[str, Any]:
        """Each prompt with its success over time; the last numbers are those of the curriculum."""
        found: dict[int, dict[str, Any]] = {}
        for line in self._prompts.read():
            one = found.setdefault(line.get("prompt_id", -1), {"history": []})
            one |= {k: line.get(k) for k in ("prompt", "success_rate", "weight", "difficulty")}
            one["history"].append(
                [line.get(k) for k in ("iteration", "correctness", "success_rate", "responses")]
            )
        rows = [{"prompt_id": key} | one for key, one in found.items()]
        return {"prompts": rows, "is_recorded": self._prompts.path.is_file()}

    def _file(self, number: int) -> IterationFile:
        path = self.path / "trajectories" / f"{number:06d}.jsonl"
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise Missing(
                f"{self.name} has no responses of iteration {number}: trajectories.every says "
                "which iterations are written"
            ) from None
        key = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if key not in self._files:
                self._files[key] = IterationFile(path, number)
            self._files.move_to_end(key)
            while len(self._files) > FILES_KEPT:
                self._files.popitem(last=False)
            return self._files[key]


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # Not ours to read.
        return []


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _eta_s(iterations: list[dict[str, Any]], total: int | None) -> float | None:
    recent = [line["wall_s"] for line in iterations[-ETA_ITERATIONS:] if line.get("wall_s")]
    if not (recent and total):
        return None
    return sum(recent) / len(recent) * max(0, total - iterations[-1].get("iteration", 0))


def _changed_s(*paths: Path) -> float | None:
    """When one of the files last changed, seconds since 1970."""
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return max(times, default=None)
