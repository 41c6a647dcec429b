"""The folder of one run: its lock, its settings, and states that survive any crash.

::

    runs/think/
      lock            held by the process that runs; holds its pid
      config.toml     every setting of the run, resolved
      buffer.bin      the rollout buffer, to which tokens are added as they are sampled
      states/000012/  what iteration 13 starts from: tensors.safetensors, state.json, other files
      checkpoint/     the policy in Hugging Face format

A state is written under a name that ends in ``.tmp``, forced to disk, and only then renamed, so a
folder without ``.tmp`` in its name is whole. The newest two states are kept. Each holds checksums
of its files; if the newest is damaged, the one before is used, and the damaged one is renamed to
``000012.damaged``. ``docs/metrics.md`` has the other files.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kimi_core.config import Config, Section
from kimi_core.run.checksums import damage_in, write_checksums
from kimi_core.run.config_file import dump_toml, load_config
from kimi_core.run.files import (
    OUT_OF_ROOM,
    discard,
    finish_swap,
    os_errors,
    swap,
    sync,
    sync_tree,
    write_atomically,
)

MAY_CHANGE_ON_RESUME = (
    "name",
    "runs",
    "iterations",
    "samples",
    "save_every",
    "evaluation",
    "trajectories",
    "curate",
    "warmup",
    "long2short",
)
"""Keys and sections that do not change what an iteration computes."""

MAY_CHANGE_WITH_A_LINE = (
    "trainer.learning_rate",
    "trainer.grad_clip",
    "trainer.tokens_per_micro_batch",
    "trainer.head_chunk",
    "trainer.memory_gb",
    "trainer.ranks",
    "trainer.ranks_timeout_s",
    "trainer.logprob_gap_limit",
    "rollout.batch_rows",
    "rollout.vllm",
    "reward.workers",
    "reward.timeout_s",
    "reward.sandbox",
    "reward.judge",
    "model.device",
)
"""Keys and sections that our own errors advise to change. A line of metrics.jsonl says so."""

KEPT_STATES = 2

TRACES = ("checkpoint", "summary.json", "metrics.jsonl")
"""Other files that a run leaves; a folder with any of them is not used for a new run."""


@dataclass(frozen=True)
class SavedState:
    """What ``RunFolder.save_state`` was given, read back."""

    iteration: int
    """Iterations done when it was saved; 0 is the start of RL."""
    folder: Path
    """Holds the files that the writers wrote."""
    state: dict[str, Any]
    remark: str = ""
    """Which newer state is damaged and was passed over."""


class RunFolder:
    """A locked run folder. Made by ``create`` or ``resume``; released by ``close`` or at exit."""

    def __init__(self, path: str | Path) -> None:
        """Make and lock the folder. Call ``create`` or ``resume`` instead.

        Raises:
            ValueError: another process runs in this folder.
        """
        self.path = Path(path)
        self.states = self.path / "states"
        self.checkpoint = self.path / "checkpoint"
        self.buffer = self.path / "buffer.bin"
        self.changed: dict[str, list[Any]] = {}
        """Settings that differ from the saved ones in a way that a line of metrics.jsonl tells."""
        self.states.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = take_lock(self.path)
        finish_swap(self.checkpoint)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """Start a run at ``path`` and write its settings there.

        Raises:
            ValueError: another process runs in this folder, or it holds a run already.
        """
        with ExitStack() as on_error:
            run = on_error.enter_context(cls(path))
            found = run.latest_state()
            if found:
                raise ValueError(
                    f"{run.path} holds a run that reached iteration {found[0]}: continue it with "
                    "--resume, or give this one another name=..."
                )
            traces = [name for name in TRACES if (run.path / name).exists()]
            if traces:
                raise ValueError(
                    f"{run.path} holds {', '.join(traces)} of an earlier run, without a state to "
                    "resume from: give this run another name=..., or remove that folder"
                )
            write_atomically(run.path / "config.toml", dump_toml(config))
            on_error.pop_all()
        return run

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> "RunFolder":
        """Open the run at ``path`` to continue it from the state that ``load_state`` gives.

        Settings in ``MAY_CHANGE_ON_RESUME`` and ``MAY_CHANGE_WITH_A_LINE`` may differ from the
        saved ones; the new ones are saved. If config.toml is lost, a state has the settings, too.

        Raises:
            ValueError: there is no run or no state, another process runs in this folder, or
                another setting differs; each is named with its saved and its given value.
        """
        if not (Path(path) / "states").is_dir():
            raise ValueError(
                f"No run to resume in {path}: it has no states; start one without --resume, or "
                "give the name=... of a run that exists"
            )
        with ExitStack() as on_error:
            run = on_error.enter_context(cls(path))
            if run.latest_state() is None:
                raise ValueError(
                    f"No state to resume from in {path}: the run stopped before its first one was "
                    "saved; start it again without --resume"
                )
            run.changed = _changed(run.path, run._saved_config(), config)
            write_atomically(run.path / "config.toml", dump_toml(config))
            on_error.pop_all()
        return run

    def _saved_config(self) -> Config:
        saved = self.path / "config.toml"
        try:
            return load_config(saved)
        except ValueError:  # It is missing or damaged.
            whole, _ = self._examined()
            record = json.loads((whole[1] / "state.json").read_text())
            write_atomically(saved, record["config"])
            return load_config(saved)

    def latest_state(self) -> tuple[int, Path] | None:
        """The newest whole state as ``(iteration, folder)``; None where none was saved."""
        found = _whole_states(self.states)
        return found[-1] if found else None

    def save_state(
        self,
        iteration: int,
        writers: Sequence[Callable[[Path], None]],
        state: Mapping[str, Any],
        fingerprint: str = "",
    ) -> Path:
        """Make everything the next iteration starts from durable; then drop the older state.

        Args:
            iteration: iterations done, at least 0. Saving the same one again replaces it.
            writers: functions that write their files into the folder they are given.
            state: whatever else there is, as JSON.
            fingerprint: names the model; ``load_state`` refuses another.

        Returns the folder of the state. When it returns, the state survives a power cut.

        Raises:
            OSError: the disk or the quota is full, or the disk has another fault. The half-written
                folder is gone, and the previous state is as it was.
        """
        final = self.states / f"{iteration:06d}"
        partial = final.with_suffix(".tmp")
        for leftover in self.states.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        with self._writing(partial, f"the state of iteration {iteration}"):
            partial.mkdir()
            for write in writers:
                write(partial)
            settings = self.path / "config.toml"
            record = {
                "iteration": iteration,
                "fingerprint": fingerprint,
                "config": settings.read_text() if settings.is_file() else "",
                "state": dict(state),
            }
            (partial / "state.json").write_text(json.dumps(record, indent=1))
            write_checksums(partial)
            sync_tree(partial)
            swap(partial, final)
        kept = sorted({iteration for iteration, _ in _whole_states(self.states)})[-KEPT_STATES:]
        for older in list(self.states.iterdir()):
            if _iteration_of(older) < kept[0]:
                discard(older)
        return final

    def load_state(self, fingerprint: str = "") -> SavedState:
        """Read the newest state back whose files are as they were written.

        Newer ones, which are damaged, are renamed: they must not count among the states that
        ``save_state`` keeps.

        Raises:
            ValueError: there is none, or it is of a model with another fingerprint. Nothing is
                renamed then.
        """
        (iteration, folder), damaged = self._examined()
        record = json.loads((folder / "state.json").read_text())
        if record["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} was saved with the model {record['fingerprint']!r} and cannot be "
                f"continued with {fingerprint!r}: resume with the same model, or start a run with "
                "another name=..."
            )
        for newer in damaged:
            set_aside = newer.with_suffix(".damaged")
            discard(set_aside)
            newer.rename(set_aside)
        sync(self.states)
        remark = f"{'; '.join(damaged.values())}: continuing from the state of {iteration}"
        return SavedState(iteration, folder, record["state"], remark if damaged else "")

    def _examined(self) -> tuple[tuple[int, Path], dict[Path, str]]:
        """The newest state without damage, as ``(iteration, folder)``; the damage in newer ones."""
        damaged: dict[Path, str] = {}
        for iteration, folder in reversed(_whole_states(self.states)):
            damage = damage_in(folder)
            if not damage:
                return (iteration, folder), damaged
            damaged[folder] = damage
        if not damaged:
            raise ValueError(f"No state in {self.states}: start the run without --resume")
        raise ValueError(
            f"No state to resume from in {self.path}: {'; '.join(damaged.values())}. Put the files "
            "back from a copy, or start a run with another name=..."
        )

    def save_checkpoint(self, model: Any, tokenizer: Any) -> Path:
        """Write policy and tokenizer in Hugging Face format to ``checkpoint/``, in one swap.

        Args:
            model: has ``save_pretrained``, as has ``tokenizer``.

        Raises:
            OSError: the disk is full; the previous checkpoint is as it was.
        """
        partial = self.path / "checkpoint.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        with self._writing(partial, "the checkpoint"):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            sync_tree(partial)
            swap(partial, self.checkpoint)
        return self.checkpoint

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self, partial: Path, what: str) -> Iterator[None]:
        """Remove ``partial`` at the end; if the disk is full, say what to do."""
        try:
            with os_errors():
                yield
        except OSError as error:
            if error.errno not in OUT_OF_ROOM:
                raise
            written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.path).free
            raise OSError(
                error.errno,
                f"Cannot save {what} in {self.path}: {error.strerror} after {written / 1e6:.1f} MB"
                f"; {free / 1e6:.1f} MB are free without it. {self._way_on()}",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _way_on(self) -> str:
        found = self.latest_state()
        if found is None:
            return "No state was saved before: make room there and start again"
        return f"The state of iteration {found[0]} is intact: make room there, then --resume"


def holds_state(path: str | Path) -> bool:
    """Whether there is a run at ``path`` that ``RunFolder.resume`` could go on with."""
    path = Path(path)
    return (path / "states").is_dir() and bool(_whole_states(path / "states"))


def _changed(path: Path, saved: Config, given: Config) -> dict[str, list[Any]]:
    """Key → [saved, given] of the settings in ``MAY_CHANGE_WITH_A_LINE`` that differ.

    Raises:
        ValueError: a setting differs that may not.
    """
    before, now = flatten(saved), flatten(given)
    differ = {key: [before[key], now[key]] for key in before if before[key] != now[key]}
    refused = {
        key: pair
        for key, pair in differ.items()
        if not _among(key, MAY_CHANGE_ON_RESUME) and not _among(key, MAY_CHANGE_WITH_A_LINE)
    }
    if refused:
        lines = [f"  {key}: saved {a!r}, given {b!r}" for key, (a, b) in refused.items()]
        raise ValueError(
            f"Cannot resume {path} with other settings:\n" + "\n".join(lines) + "\n"
            f"Give the saved values, or start a run with another name=...; only "
            f"{', '.join(MAY_CHANGE_ON_RESUME + MAY_CHANGE_WITH_A_LINE)} may change"
        )
    return {key: pair for key, pair in differ.items() if _among(key, MAY_CHANGE_WITH_A_LINE)}


def _among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of every setting."""
    flat: dict[str, Any] = {}
    for key, value in section:
        nested = isinstance(value, Section)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def take_lock(path: Path) -> int:
    """Lock ``path/lock`` and write our pid into it; closing the descriptor releases the lock.

    Raises:
        ValueError: another process holds it.
    """
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ValueError(
            f"{path} is in use by the process with pid {holder}: wait for it or stop it, or give "
            "this run another name=..."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _iteration_of(folder: Path) -> float:
    """Iterations done when it was saved; infinite for what is no state."""
    name = re.fullmatch(r"(\d{6,})(\.old|\.damaged)?", folder.name)
    return int(name[1]) if name else float("inf")


def _whole_states(states: Path) -> list[tuple[int, Path]]:
    """Every whole state, oldest first. ``.old`` marks one that a newer write was replacing."""
    found = []
    for folder in states.iterdir():
        name = re.fullmatch(r"(\d{6,})(\.old)?", folder.name)
        if name:
            found.append((int(name[1]), name[2] is None, folder))
    return [(iteration, folder) for iteration, _, folder in sorted(found)]
