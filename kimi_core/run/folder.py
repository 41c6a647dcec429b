"""The folder of one run: its lock, its settings, and where its states are.

::

    runs/think/
      lock            held by the process that runs; holds its pid
      config.toml     every setting of the run, resolved
      tokenizer.json  the tokenizer, if the tokenizers library can read it
      buffer.bin      the rollout buffer, to which tokens are added as they are sampled
      rollout.json    the last iteration whose tokens are all in the buffer
      sft/000200/     what step 201 of SFT starts from; removed when RL starts
      states/000012/  what iteration 13 starts from: tensors.safetensors, state.json, other files
      checkpoint/     the policy in Hugging Face format
      best/           the policy of the best evaluation, if evaluation.best names what counts

``states.py`` says why a state survives. ``docs/metrics.md`` has the other files.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from kimi_core.config import Config, Section
from kimi_core.run.checksums import checksum
from kimi_core.run.config_file import dump_toml, load_config, parse_config
from kimi_core.run.files import clean, finish_swap, put_in_place, write_atomically
from kimi_core.run.lock import take_lock
from kimi_core.run.states import SavedState, States, removed_if_unfinished

if TYPE_CHECKING:
    from kimi_core.models.vision import Images

MAY_CHANGE_ON_RESUME = (
    "name",
    "runs",
    "iterations",
    "samples",
    "save_every",
    "keep_states",
    "resume",
    "grace_s",
    "tracker",
    "sft.save_every",
    "evaluation",
    "trajectories",
    "curate",
    "warmup",
    "long2short",
)
"""Keys and sections that do not change what an iteration computes."""

MAY_CHANGE_WITH_A_LINE = (
    "trainer.learning_rate",
    "trainer.schedule",
    "trainer.grad_clip",
    "trainer.tokens_per_micro_batch",
    "trainer.head_chunk",
    "trainer.memory_gb",
    "trainer.ranks",
    "trainer.ranks_timeout_s",
    "trainer.tensor_parallel",
    "trainer.context_parallel",
    "trainer.replicas",
    "trainer.logprob_gap_limit",
    "rollout.batch_rows",
    "rollout.workers",
    "rollout.worker_timeout_s",
    "cluster",
    "rollout.vllm",
    "reward.workers",
    "reward.timeout_s",
    "reward.sandbox",
    "reward.judge",
    "model.device",
)
"""Keys and sections that our errors advise to change. A line of metrics.jsonl says so."""

TOKENIZER = "tokenizer.json"
CHECKPOINT, BEST = "checkpoint", "best"

TRACES = ("checkpoint", "summary.json", "metrics.jsonl")
"""Other files that a run leaves; a folder with any of them is not used for a new run."""


class RunFolder:
    """A locked run folder. Made by ``create`` or ``resume``; released by ``close`` or at exit."""

    def __init__(self, path: str | Path) -> None:
        """Make and lock the folder. Call ``create`` or ``resume`` instead.

        Raises:
            ValueError: another process runs in this folder.
        """
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self.buffer = self.path / "buffer.bin"
        self.tokenizer = self.path / TOKENIZER
        self.changed: dict[str, list[Any]] = {}
        """What differs from the saved state in a way that a line of metrics.jsonl tells."""
        self.data: dict[str, str] = {}
        """Name → digest of what the run reads outside of the folder; part of every state."""
        self.environment: dict[str, str] = {}
        """Name → what decides the last bits of a computation; part of every state."""
        self._settings = ""
        """The text of config.toml."""
        self.accept_changes = False
        """Whether a state is taken whose ``data`` or training prompts differ."""
        self.states, self.sft_states = self.states_in(self.path)
        self.states.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = take_lock(self.path)
        finish_swap(self.checkpoint)
        finish_swap(self.path / BEST)
        clean(self.path)

    @staticmethod
    def states_in(path: Path) -> tuple[States, States]:
        """The states of RL and of SFT of a run at ``path``."""
        return States(path / "states", "iteration"), States(path / "sft", "SFT step")

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """Start a run at ``path`` and write its settings there.

        Raises:
            ValueError: another process runs in this folder, or it holds a run already.
        """
        with ExitStack() as on_error:
            run = on_error.enter_context(cls(path))
            _refuse_taken(run.path)
            run._take(config)
            on_error.pop_all()
        return run

    @classmethod
    def resume(cls, path: str | Path, config: Config) -> "RunFolder":
        """Open the run at ``path`` to continue it from the state that ``load_state`` gives.

        Settings in ``MAY_CHANGE_ON_RESUME`` and ``MAY_CHANGE_WITH_A_LINE`` may differ from those of
        the newest state; the new ones are saved. A state has them under its checksum, so
        config.toml may be lost or damaged.

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
            if run._newest().latest() is None:
                raise ValueError(
                    f"No state to resume from in {path}: the run stopped before its first one was "
                    "saved; start it again without --resume"
                )
            run.changed = _changed(run.path, _saved_config(run.path), config)
            run._take(config)
            on_error.pop_all()
        return run

    def _take(self, config: Config) -> None:
        self._settings = dump_toml(config)
        write_atomically(self.path / "config.toml", self._settings)
        self.states.keep = self.sft_states.keep = config.keep_states

    def _newest(self) -> States:
        """The states of RL or, before the first of them, those of SFT."""
        return self.states if self.states.latest() else self.sft_states

    def record(self, fingerprint: str) -> dict[str, Any]:
        """What every state says of its run. ``fingerprint`` names the model."""
        return {
            "fingerprint": fingerprint,
            "config": self._settings,
            "data": self.data,
            "environment": self.environment,
        }

    def save_state(
        self,
        iteration: int,
        writers: Sequence[Callable[[Path], None]],
        state: Mapping[str, Any],
        fingerprint: str = "",
    ) -> Path:
        """Save everything that the next iteration starts from, as ``States.save`` does it.

        Args:
            iteration: iterations done, at least 0.
            writers: functions that write their files into the folder they are given.
            state: whatever else there is, as JSON.
            fingerprint: names the model; ``load_state`` refuses another.
        """
        names = ("metrics.jsonl", f"trajectories/{iteration:06d}.jsonl")
        records = {name: checksum(self.path / name) for name in names if self._has(name)}
        record = self.record(fingerprint) | {
            "iteration": iteration,
            "state": dict(state),
            "records": records,
        }
        return self.states.save(iteration, writers, record)

    def _has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def load_state(self, fingerprint: str = "", states: States | None = None) -> SavedState:
        """Read the newest state back whose files are as they were written.

        Newer ones, which are damaged, are set aside.

        Args:
            fingerprint: names the model.
            states: where it is; None: the states of RL.

        Raises:
            ValueError: there is none, or it is of a model with another fingerprint. Nothing is
                renamed then.
        """
        states = states or self.states
        saved = states.load()
        if saved.record["fingerprint"] != fingerprint:
            raise ValueError(
                f"{saved.folder} was saved with the model {saved.record['fingerprint']!r} and "
                f"cannot be continued with {fingerprint!r}: resume with the same model, or start a "
                "run with another name=..."
            )
        states.set_aside_after(saved.number)
        return saved

    def compare(self, saved: SavedState) -> None:
        """Add to ``changed`` what the run reads, and where it runs, that a state had otherwise.

        Raises:
            ValueError: what it reads or has recorded has changed, and ``accept_changes`` is not
                set. A record that is missing does not count.
        """
        other = changes(saved.record.get("data", {}), self.data)
        for name, before in saved.record.get("records", {}).items():
            now = checksum(self.path / name, before[1]) if self._has(name) else before
            if now != before:
                other[str(self.path / name)] = [f"{before[1]} bytes", "other ones, or fewer"]
        if other and not self.accept_changes:
            raise ValueError(
                f"Changed since {saved.folder} was saved: {', '.join(other)}. Put the old content "
                "back, give --accept-changes to continue with the new one, or start a run with "
                "another name=..."
            )
        self.changed |= other | changes(saved.record.get("environment", {}), self.environment)

    def save_checkpoint(
        self,
        model: Any,
        tokenizer: Any,
        images: "Images | None" = None,
        *,
        name: str = CHECKPOINT,
        also: Mapping[str, str] = MappingProxyType({}),
    ) -> Path:
        """Write policy and tokenizer in Hugging Face format to ``checkpoint/``, in one swap.

        Args:
            model: has ``save_pretrained``, as has ``tokenizer``.
            images: their processor is written, too.
            name: of the folder, in place of ``checkpoint``.
            also: name → text of other files.

        Raises:
            OSError: the disk is full; the previous checkpoint is as it was.
        """
        from kimi_core.models.load import no_progress_bars  # Loads torch.

        final = self.path / name
        partial = final.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        unfinished = removed_if_unfinished(partial, f"the {name}", self._newest().way_on)
        with unfinished, no_progress_bars():
            partial.mkdir()  # ``save_pretrained`` would make a run's folder that has vanished.
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if images is not None:
                images.save(partial)
            for file, text in also.items():
                (partial / file).write_text(text)
            put_in_place(partial, final)
        return final

    def close(self) -> None:
        """Wait for the disk as ``States.wait`` does, then release the lock. Safe to call twice."""
        try:
            self.states.wait()
            self.sft_states.wait()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holds_state(path: str | Path) -> bool:
    """Whether there is a run at ``path`` that ``RunFolder.resume`` could go on with."""
    with_states = RunFolder.states_in(Path(path))
    return any(states.latest() for states in with_states)


def refuse_early(path: Path, config: Config, *, resume: bool) -> None:
    """Refuse what ``create`` or ``resume`` will refuse, before a model is loaded for it.

    Raises:
        ValueError: a new run's folder is taken, or settings differ that may not.
    """
    if not resume:
        _refuse_taken(path)
        return
    try:
        saved = _saved_config(path)
    except ValueError:  # ``resume`` says which states are damaged.
        return
    _changed(path, saved, config)


def _saved_config(path: Path) -> Config:
    """The settings of the newest state."""
    of_rl, of_sft = RunFolder.states_in(path)
    states = of_rl if of_rl.latest() else of_sft
    record = states.newest_record()
    try:
        return parse_config(record["config"], states.folder)
    except ValueError:  # An earlier version wrote it. config.toml may have been mended.
        return load_config(path / "config.toml")


def _refuse_taken(path: Path) -> None:
    for states in RunFolder.states_in(path):
        if found := states.latest():
            raise ValueError(
                f"{path} holds a run that reached {states.of} {found[0]}: continue it with "
                "--resume, or give this one another name=..."
            )
    traces = [name for name in TRACES if (path / name).exists()]
    if traces:
        raise ValueError(
            f"{path} holds {', '.join(traces)} of an earlier run, without a state to resume from: "
            "give this run another name=..., or remove that folder"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name → [before, now] of what is in both and differs."""
    both = [key for key in before if key in now]
    return {key: [before[key], now[key]] for key in both if before[key] != now[key]}


def _changed(path: Path, saved: Config, given: Config) -> dict[str, list[Any]]:
    """Key → [saved, given] of the settings in ``MAY_CHANGE_WITH_A_LINE`` that differ.

    Raises:
        ValueError: a setting differs that may not.
    """
    before, now = flatten(saved), flatten(given)
    differ = changes(before, now)
    told: tuple[str, ...] = MAY_CHANGE_WITH_A_LINE
    if given.trainer.schedule.shape != "constant" or given.trainer.schedule.warmup:
        told = (*told, "iterations")  # The schedule depends on it.
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
    return {key: pair for key, pair in differ.items() if _among(key, told)}


def _among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of every setting."""
    flat: dict[str, Any] = {}
    for key, value in section:
        nested = isinstance(value, Section)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
