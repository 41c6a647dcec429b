"""The state of a run: how it is saved, restored, and joined with the live buffer file.

The live file ``runs/NAME/buffer.bin`` changes with every segment. A state changes only when it is
saved, and it holds a snapshot of the buffer. The file's mark tells whether the two still fit.
Iteration i+1 begins with these steps, after the state of i was saved if it was due:

1. the mark becomes i, and reaches the disk;
2. the trajectories that iteration i used up are evicted; the state of i lists them (``consumed``);
3. trajectories begin and grow.

Take the state of iteration n:

* A mark of n − 1 means that iteration n was the last to change the file. The file holds what the
  snapshot holds.
* A mark of n means that iteration n + 1 has begun. The file holds what the snapshot holds, and the
  tokens sampled since then with the weights of the state. Trajectories that n consumed may be gone
  or not; they are evicted a second time.
* A greater mark means that iterations went by unsaved (``save_every`` > 1), or that a newer state
  is damaged. Their tokens come from weights that are lost, and the trajectories that they trained
  are gone. The snapshot then replaces the live file.

In the first two cases the run can continue from the live file. With ``resume = "keep"`` it does.
The first token of a response that goes on then comes from a prefill and not from a decode step, and
the batch is another one, so last bits may differ. With ``resume = "exact"`` it does so only if a
whole rollout has ended since the state, and nothing of it is damaged. ``rollout.json``, written
when all tokens of an iteration are in the file, tells. Otherwise the snapshot replaces the file.
"""

import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.evaluation.progress import sealed_line, unsealed
from kimi_core.loop import Loop
from kimi_core.rollout.phase import Rollout
from kimi_core.run.files import write_atomically
from kimi_core.run.folder import RunFolder

SNAPSHOT = "buffer.bin"
PROMPTS = "prompts.npy"
CURRICULUM = "curriculum.npz"
ROLLOUT = "rollout.json"


def save(loop: Loop, folder: RunFolder, sft_s: float) -> None:
    """Save what the next iteration starts from.

    With ``exact`` a thread forces the state to disk while the next iteration samples. With ``keep``
    it is there at the end, because that iteration evicts what this one used up: after a power cut
    the state before would need the tokens.

    Args:
        sft_s: seconds that SFT took, for the summary of a resumed run.

    Raises: OSError as ``States.save`` and ``States.wait``.
    """
    rates: dict[str, Any] = loop.curriculum.state()
    writers = [
        loop.trainer.save,
        lambda partial: loop.buffer.snapshot(partial / SNAPSHOT),
        lambda partial: np.save(partial / PROMPTS, prompts_of(loop)),
        lambda partial: np.savez(partial / CURRICULUM, **rates),
    ]
    state = loop.state() | {"sft_s": sft_s}
    with loop.turns.timed("save"):
        folder.save_state(loop.iteration, writers, state, fingerprint=loop.trainer.fingerprint())
        if not is_exact(loop.config):
            folder.states.wait()


def restore(loop: Loop, folder: RunFolder) -> tuple[float, str]:
    """Take over the newest state.

    Returns the seconds that SFT took, and a line that says which buffer the run continues with.

    Raises:
        ValueError: there is no state, or it belongs to another model, or to other prompts or files
            and ``folder.accept_changes`` is not set.
    """
    saved = folder.load_state(loop.trainer.fingerprint())
    state = saved.record["state"]
    rates = curriculum_in(saved.folder, state)
    before = np.load(saved.folder / PROMPTS)
    are_others = not same_prompts(loop, before)
    if are_others:
        if not folder.accept_changes:
            raise _other_prompts(loop, before, saved.folder)
        rates, remark = _carried(rates, before, prompts_of(loop))
        folder.changed["the training prompts"] = [before.shape[-1], remark]
    folder.compare(saved)
    loop.trainer.load(saved.folder)
    loop.curriculum.load_state(rates)
    buffer, steps, remark = resume(
        folder.buffer, saved.folder / SNAPSHOT, saved.number, exact=is_exact(loop.config)
    )
    if are_others:  # The ids of the prompts may now name others.
        buffer.evict([info.trajectory_id for info in buffer.trajectories()])
        state |= {"consumed": [], "scorer": {}}
        steps = 0
    loop.load_state(state, buffer)
    loop.steps_before = steps
    return float(state["sft_s"]), f"{saved.remark}\n{remark}".strip()


def is_exact(config: Config) -> bool:
    """Whether a resumed run samples a rollout that was cut off a second time."""
    return (config.resume or ("exact" if config.rollout.engine == "torch" else "keep")) == "exact"


def note_rollout(loop: Loop, rollout: Rollout, path: Path) -> None:
    """Write down that the live file holds all tokens of the iteration that runs."""
    noted = {
        "iteration": loop.iteration + 1,
        "tokens": loop.buffer.stats().tokens,
        "decode_steps": rollout.decode_steps,
    }
    write_atomically(path.with_name(ROLLOUT), sealed_line(noted))


def curriculum_in(folder: Path, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The success rates of a saved state: its folder and its JSON, where earlier versions kept
    them."""
    path = folder / CURRICULUM
    if path.exists():
        with np.load(path) as found:
            return dict(found)
    return {key: np.array(value) for key, value in state["curriculum"].items()}


def prompts_of(loop: Loop) -> np.ndarray:
    """Ids of the training prompts and checksums of what they ask, int64 ``[2, n]``."""
    facts = loop.prompts.facts
    return np.stack([facts.ids, facts.checksums.astype(np.int64)])


def same_prompts(loop: Loop, before: np.ndarray) -> bool:
    """Whether ``before``, of a state, is what ``prompts_of`` gives now."""
    if before.ndim == 2:
        return np.array_equal(before, prompts_of(loop))
    # Until November 2026 a state had the CRC-32 of each id with text and answer, uint32 [n].
    every = (f"{one.id}\0{one.text}\0{one.answer}" for one in loop.prompts.prompts)
    return before.tolist() == [zlib.crc32(one.encode(errors="replace")) for one in every]


def _other_prompts(loop: Loop, before: np.ndarray, folder: Path) -> ValueError:
    now = prompts_of(loop)
    said = f"{before.shape[-1]} training prompts then, {now.shape[1]} now"
    if before.ndim == 2:
        both = min(before.shape[1], now.shape[1])
        changed = np.flatnonzero((before[:, :both] != now[:, :both]).any(axis=0))
        if len(changed):
            first = loop.prompts.prompts[int(changed[0])]
            said += f", {len(changed)} of the first {both} differ, such as prompt {first.id}"
            said += f" ({first.text!r:.60})"
    return ValueError(
        f"The prompts have changed since {folder} was saved: {said}. The run's success rates "
        "belong to the old ones. Put the prompts back; or give --accept-changes, which carries the "
        "success rates of prompts that are still there over and drops unfinished responses; or "
        "start a run with another name=... and model.name set to this run's checkpoint"
    )


def _carried(
    rates: dict[str, np.ndarray], before: np.ndarray, now: np.ndarray
) -> tuple[dict[str, np.ndarray], str]:
    """The success rates by the rows of prompts that ask the same, and how many there are."""
    row_of = {content: row for row, content in enumerate(now[1].tolist())}
    contents = before[1][rates["rows"]].tolist() if before.ndim == 2 else []
    kept = [at for at, content in enumerate(contents) if content in row_of]
    rows = np.array([row_of[contents[at]] for at in kept], np.int64)
    remark = (
        f"{now.shape[1]}, success rates of {len(kept)} of {len(rates['attempts'])} carried over"
    )
    carried = {key: rates[key][kept] for key in ("attempts", "successes")}
    return rates | carried | {"rows": rows}, remark


def start(path: Path, new_buffer: Callable[[Path], RolloutBuffer]) -> RolloutBuffer:
    """Make an empty live file. It replaces one of a run that never saved a state."""
    path.unlink(missing_ok=True)
    return new_buffer(path)


def nameless(new_buffer: Callable[[Path], RolloutBuffer]) -> RolloutBuffer:
    """Make an empty buffer outside of any run: its file has no name, and ends with the object."""
    with tempfile.TemporaryDirectory() as folder:
        return new_buffer(Path(folder) / "buffer.bin")


def resume(
    path: Path, snapshot: Path, iteration: int, *, exact: bool
) -> tuple[RolloutBuffer, int, str]:
    """The buffer that continues the state of ``iteration``, the decode steps of the rollout that it
    holds, and a line that says which buffer it is.
    """
    try:
        buffer = RolloutBuffer.open(path)
    except FileNotFoundError:
        return _restore(path, snapshot), 0, f"{path} is missing: restored from {snapshot}"
    except ValueError as error:
        return _restore(path, snapshot), 0, f"{error}; restored from {snapshot}"
    stats, damage = buffer.stats(), _damage(buffer)
    steps = _steps_of_whole_rollout(path, iteration + 1, stats.tokens)
    if buffer.mark not in (iteration - 1, iteration):
        remark = f"{path} is of iteration {buffer.mark}: restored from {snapshot}"
    elif exact and damage:
        remark = f"{path} is damaged ({damage}): restored from {snapshot}"
    elif exact and buffer.mark == iteration and steps is None:
        remark = (
            f"iteration {iteration + 1} was cut off and is sampled from its start "
            f"(resume=keep goes on with the {stats.tokens} tokens in {path})"
        )
    elif exact and buffer.mark < iteration:
        remark = f"{path} has no token of iteration {iteration + 1}: restored from {snapshot}"
    else:
        remark = f"{path}: {stats.unfinished} unfinished trajectories, {stats.tokens} tokens"
        return buffer, steps or 0, f"{remark}; {damage}" if damage else remark
    buffer.close()
    return _restore(path, snapshot), 0, remark


def _damage(buffer: RolloutBuffer) -> str:
    """What the recovery found, in words; empty: nothing."""
    cuts, lost = buffer.recovery["cuts"], buffer.recovery["slots_lost"]
    tokens = sum(tokens for _, _, tokens in cuts)
    said = f"{len(cuts)} were damaged and cut, {tokens} tokens are sampled again" if cuts else ""
    return "; ".join(filter(None, (said, f"{lost} trajectories are lost" if lost else "")))


def _steps_of_whole_rollout(path: Path, iteration: int, tokens: int) -> int | None:
    """Decode steps of the rollout of ``iteration``; None: not all of its tokens are there."""
    try:
        noted = unsealed(path.with_name(ROLLOUT).read_bytes())
    except FileNotFoundError:
        return None
    if noted is None or (noted["iteration"], noted["tokens"]) != (iteration, tokens):
        return None
    return int(noted["decode_steps"])


def _restore(path: Path, snapshot: Path) -> RolloutBuffer:
    partial = path.with_name(path.name + ".tmp")
    shutil.copyfile(snapshot, partial)
    partial.replace(path)
    return RolloutBuffer.open(path)
