"""Runs of an experiment, each in a process with one thread. A run that has its summary is kept."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks.py"

S = TypeVar("S")
T = TypeVar("T")

KIMI = ("-m", "kimi_core.cli")


@dataclass(frozen=True)
class Runs:
    """Makes runs in one folder, a few at a time.

    A run that a crash or Ctrl-C cut off goes on from its last state when it is asked for again.
    """

    folder: Path = Path("runs/experiments")
    jobs: int = 1
    """Runs side by side."""
    seeds: Sequence[int] = field(default=(0, 1, 2, 3, 4))

    def train(self, name: str, *settings: str) -> Path:
        """``kimi train``; the folder of the run."""
        return self._kimi("train", name, settings)

    def sft(self, name: str, *settings: str) -> Path:
        """``kimi sft``; the folder of the run, whose ``checkpoint`` is the model."""
        return self._kimi("sft", name, settings)

    def script(self, file: str, name: str, *arguments: str) -> Path:
        """A script of this folder, which gets the run's folder and ``arguments``."""
        folder = self.folder / name
        return self._make(name, [str(HERE / file), str(folder), *arguments])

    def kimi(self, *arguments: str) -> None:
        """Another command of ``kimi``, which keeps by itself what is done."""
        self._call([*KIMI, *arguments], self.folder / f"{arguments[0]}.log")

    def each(self, make: Callable[[int], T]) -> list[T]:
        """What ``make`` gives for each seed, in order."""
        return self.map(make, self.seeds)

    def map(self, make: Callable[[S], T], some: Iterable[S]) -> list[T]:
        """What ``make`` gives for each of ``some``, in order, ``jobs`` at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(make, some))

    def _kimi(self, driver: str, name: str, settings: Sequence[str]) -> Path:
        where = [f"name={name}", f"runs={self.folder}"]
        return self._make(name, [*KIMI, driver, *settings, *where, "--resume"])

    def _make(self, name: str, command: Sequence[str]) -> Path:
        """Run a command that writes ``summary.json`` into the run's folder, unless it is there.

        Raises:
            SystemExit: it failed, or what is there was made by another command.
        """
        folder, written = self.folder / name, self.folder / f"{name}.command"
        line = shlex.join(command).replace(str(HERE), "benches/figures")
        if written.exists() and written.read_text() != line:
            raise SystemExit(
                f"{folder} was made by another command:\n  {written.read_text()}\nand not by\n"
                f"  {line}\nRemove {folder} and {written}, or give another folder by --runs"
            )
        if not (folder / "summary.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            written.write_text(line)
            self._call(command, self.folder / f"{name}.log")
        return folder

    def _call(self, command: Sequence[str], log: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            done = subprocess.run(
                [sys.executable, *command],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=7200,
            )
        if done.returncode:
            last = "\n".join(log.read_text().splitlines()[-3:])
            raise SystemExit(f"{shlex.join(command)}\nfailed; the end of {log}:\n{last}")
