"""Numbered states of a run in one folder. They survive any crash, and damage is found.

A state is written under a name that ends in ``.tmp`` and renamed when it is whole. From then on the
death of the process does not lose it. A thread then forces it to disk, while the run goes on, and
after that removes older ones; the newest ``keep`` states stay. Each holds checksums of its files.
If the newest is damaged, or the machine died before it was on the disk, the one before is used, and
the damaged one is renamed to ``000012.damaged``.

``RunFolder.states`` are those of RL, ``RunFolder.sft_states`` those of SFT.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_core.run.checksums import damage_in, write_checksums
from kimi_core.run.files import OUT_OF_ROOM, discard, os_errors, settle, swap, sync, sync_tree

RECORD = "state.json"

DISK_S = 3600.0
"""Longest wait for the disk to take a state, seconds. A state of 100 GB at 100 MB/s takes 1,000."""


@dataclass(frozen=True)
class SavedState:
    """What ``States.save`` was given, read back."""

    number: int
    """Iterations done when it was saved (0 is the start of RL), or steps of SFT."""
    folder: Path
    """Holds the files that the writers wrote."""
    record: dict[str, Any]
    remark: str = ""
    """Which newer state is damaged and was passed over."""


class States:
    """The states in ``folder``, which need not exist.

    Args:
        folder: for nothing but states.
        of: what the numbers count, for messages: ``iteration`` or ``SFT step``.
        keep: whole states that ``save`` leaves there, at least 1.
    """

    def __init__(self, folder: Path, of: str, keep: int = 2) -> None:
        self.folder = folder
        self.of = of
        self.keep = keep
        self.pinned: int | None = None
        """A state that stays, too, however old it is."""
        self._forced: Future[None] | None = None
        """The thread that forces the last state to disk; None: all states are there."""

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole state as ``(number, folder)``; None where none was saved."""
        found = self._whole()
        return found[-1] if found else None

    def save(
        self,
        number: int,
        writers: Sequence[Callable[[Path], None]],
        record: Mapping[str, Any],
    ) -> Path:
        """Write a state. A thread then forces it to disk and drops older ones.

        Args:
            number: at least 0. Saving the same one again replaces it.
            writers: functions that write their files into the folder they are given.
            record: whatever else there is, as JSON.

        Returns the folder of the state, which now survives the death of the process. After ``wait``
        it survives a power cut, too.

        Raises:
            OSError: the disk or the quota is full, or the disk has another fault, now or when it
                took the state before. That state is gone, and the one before it is as it was.
        """
        self.wait()
        final = self.folder / f"{number:06d}"
        partial = final.with_suffix(".tmp")
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        what = f"the state of {self.of} {number}"
        with removed_if_unfinished(partial, what, self.way_on):
            partial.mkdir()
            for write in writers:
                write(partial)
            text = json.dumps(dict(record), separators=(",", ":"))
            (partial / RECORD).write_text(text)
            write_checksums(partial)
            swap(partial, final)
        thread = ThreadPoolExecutor(1, "states")
        self._forced = thread.submit(self._force, final, what)
        thread.shutdown(wait=False)
        return final

    def wait(self) -> None:
        """Return when the state that was saved last is on the disk.

        Raises:
            OSError: as ``save``. The state is gone.
            TimeoutError: the disk has not taken it in ``DISK_S``.
        """
        if self._forced is None:
            return
        if not wait([self._forced], DISK_S).done:
            raise TimeoutError(f"The disk has not taken a state in {self.folder} in {DISK_S:g} s")
        done, self._forced = self._forced, None
        done.result()

    def prune(self) -> None:
        """Remove all but the newest ``keep`` states and the pinned one. Raises: as ``wait``."""
        self.wait()
        self._prune()

    def _force(self, final: Path, what: str) -> None:
        """Force a state to disk; then, and not before, drop those that it makes superfluous."""
        with removed_if_unfinished(final, what, self.way_on):
            sync_tree(final)
            settle(final)
        self._prune()

    def _prune(self) -> None:
        every = list(self.folder.iterdir())
        kept = self.numbers()[-self.keep :]
        for older in every:
            if _number_of(older) < kept[0] and _number_of(older) != self.pinned:
                discard(older)

    def load(self) -> SavedState:
        """Read the newest state back whose files are as they were written. Changes nothing.

        Raises:
            ValueError: there is none.
        """
        damaged: list[str] = []
        for number, folder in reversed(self._whole()):
            damage = damage_in(folder)
            if damage:
                damaged.append(damage)
                continue
            remark = f"{'; '.join(damaged)}: continuing from the state of {number}"
            record = json.loads((folder / RECORD).read_text())
            return SavedState(number, folder, record, remark if damaged else "")
        if not damaged:
            raise ValueError(f"No state in {self.folder}: start the run without --resume")
        raise ValueError(
            f"No state to resume from in {self.folder.parent}: {'; '.join(damaged)}. Put the files "
            "back from a copy, or start a run with another name=..."
        )

    def newest_record(self) -> dict[str, Any]:
        """The JSON of the newest state in which it is as it was written, whatever else is damaged.

        Raises:
            ValueError: there is none.
        """
        for _, folder in reversed(self._whole()):
            if not damage_in(folder, only=RECORD):
                record: dict[str, Any] = json.loads((folder / RECORD).read_text())
                return record
        return self.load().record

    def numbered(self, number: int) -> SavedState | None:
        """The state of that number; None: it is not there.

        Raises:
            ValueError: it is damaged.
        """
        for one, folder in reversed(self._whole()):
            if one == number:
                if damage := damage_in(folder):
                    raise ValueError(damage)
                return SavedState(one, folder, json.loads((folder / RECORD).read_text()))
        return None

    def numbers(self) -> list[int]:
        """Of all whole states, oldest first."""
        return sorted({number for number, _ in self._whole()})

    def set_aside_after(self, number: int) -> None:
        """Rename newer states, which are damaged: they must not count among those that are kept."""
        for newer, folder in self._whole():
            if newer > number:
                set_aside = folder.with_suffix(".damaged")
                discard(set_aside)
                folder.rename(set_aside)
        sync(self.folder)

    def remove(self) -> None:
        """Remove all of them, with the folder. Raises: as ``wait``."""
        self.wait()
        discard(self.folder)

    def way_on(self) -> str:
        """What to do after a full disk."""
        found = self.latest()
        if found is None:
            return "No state was saved before: make room there, then --resume starts it again"
        return f"The state of {self.of} {found[0]} is intact: make room there, then --resume"

    def _whole(self) -> list[tuple[int, Path]]:
        """Every whole state, oldest first. ``.old`` marks one that a newer write was replacing."""
        found = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            name = re.fullmatch(r"(\d{6,})(\.old)?", folder.name)
            if name:
                found.append((int(name[1]), name[2] is None, folder))
        return [(number, folder) for number, _, folder in sorted(found)]


@contextmanager
def removed_if_unfinished(partial: Path, what: str, way_on: Callable[[], str]) -> Iterator[None]:
    """Remove the folder ``partial`` if the block fails; if the disk is full, say what to do.

    Raises:
        OSError: what was raised inside; that of a full disk names ``what`` and the way on.
    """
    try:
        with os_errors():
            yield
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) or error.errno not in OUT_OF_ROOM:
            raise
        free = shutil.disk_usage(partial.parent).free
        raise OSError(
            error.errno,
            f"Cannot save {what} in {partial.parent}: {error.strerror} after {written / 1e6:.1f} MB"
            f"; {free / 1e6:.1f} MB are free without it. {way_on()}",
        ) from error


def _number_of(folder: Path) -> float:
    """The number of a state; infinite for what is no state."""
    name = re.fullmatch(r"(\d{6,})(\.old|\.damaged)?", folder.name)
    return int(name[1]) if name else float("inf")
