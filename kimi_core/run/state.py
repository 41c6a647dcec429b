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
* A greater mark means that iterations went by unsaved (``save_every`` > 1). Their tokens come from
  weights that are lost, and the trajectories that they trained are gone. The snapshot then replaces
  the live file.

In the first two cases the run can continue from the live file. With ``resume = "keep"`` it does.
The
first token of a response that goes on then comes from a prefill and not from a decode step, and the
batch is another one, so last bits may differ. With ``resume = "exact"`` it does so only if the file
holds what the unbroken run would have in it: no rollout has begun since the state, or a whole one.
``rollout.json`` is written when all tokens of an iteration are in the file, and tells. Otherwise
the snapshot replaces the file, and the iteration is sampled a second time.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.loop import Loop
from kimi_core.rollout.phase import Rollout
from kimi_core.run.files import write_atomically
from kimi_core.run.folder import RunFolder

SNAPSHOT = "buffer.bin"
PROMPTS = "prompts.npy"
CURRICULUM = "curriculum.npz"
ROLLOUT = "rollout.json"


def save(loop: Loop, folder: RunFolder, sft_s: float) -> None:
    """Make durable what the next iteration starts from.

    Args:
        sft_s: seconds that SFT took, for the summary of a resumed run.

    Raises: OSError as ``RunFolder.save_state``.
    """
    rates: dict[str, Any] = loop.curriculum.state()
    writers = [
        loop.trainer.save,
        lambda partial: loop.buffer.snapshot(partial / SNAPSHOT),
        lambda partial: np.save(partial / PROMPTS, loop.prompts.facts.checksums),
        lambda partial: np.savez(partial / CURRICULUM, **rates),
    ]
    state = loop.state() | {"sft_s": sft_s}
    folder.save_state(loop.iteration, writers, state, fingerprint=loop.trainer.fingerprint())


def restore(loop: Loop, folder: RunFolder) -> tuple[float, str]:
    """Take over the newest state.

    Returns the seconds that SFT took, and a line that says which buffer the run continues with.

    Raises:
        ValueError: there is no state, or it belongs to another model or to other prompts.
    """
    saved = folder.load_state(loop.trainer.fingerprint())
    _check_prompts(loop, saved.folder / PROMPTS)
    loop.trainer.load(saved.folder)
    state = saved.record["state"]
    loop.curriculum.load_state(curriculum_in(saved.folder, state))
    buffer, steps, remark = resume(
        folder.buffer, saved.folder / SNAPSHOT, saved.number, exact=is_exact(loop.config)
    )
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
    write_atomically(path.with_name(ROLLOUT), json.dumps(noted) + "\n")


def curriculum_in(folder: Path, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The success rates of a saved state: its folder and its JSON, where earlier versions kept
    them."""
    path = folder / CURRICULUM
    if path.exists():
        with np.load(path) as found:
            return dict(found)
    return {key: np.array(value) for key, value in state["curriculum"].items()}


def _check_prompts(loop: Loop, path: Path) -> None:
    before, now = np.load(path), loop.prompts.facts.checksums
    if np.array_equal(before, now):
        return
    both = min(len(before), len(now))
    changed = np.flatnonzero(before[:both] != now[:both])
    first = loop.prompts.prompts[int(changed[0])] if len(changed) else None
    said = f"{len(before)} training prompts then, {len(now)} now"
    if first is not None:
        said += f", {len(changed)} of the first {both} differ, such as prompt {first.id}"
        said += f" ({first.text!r:.60})"
    raise ValueError(
        f"The prompts have changed since {path.parent} was saved: {said}. The run's success rates "
        "belong to the old ones. Put the prompts back, or start a run with another name=... and "
        "model.name set to this run's checkpoint"
    )


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
    if buffer.mark not in (iteration - 1, iteration):
        remark = f"{path} is of iteration {buffer.mark}: restored from {snapshot}"
        buffer.close()
        return _restore(path, snapshot), 0, remark
    stats, cuts = buffer.stats(), buffer.recovery["cuts"]
    steps = _steps_of_whole_rollout(path, iteration + 1, stats.tokens)
    if exact and (cuts or (buffer.mark == iteration and steps is None)):
        buffer.close()
        remark = f"iteration {iteration + 1} was cut off: it is sampled from its start"
        return _restore(path, snapshot), 0, remark
    remark = f"{path}: {stats.unfinished} unfinished trajectories, {stats.tokens} tokens"
    if cuts:
        lost = sum(lost for _, _, lost in cuts)
        remark += f"; {len(cuts)} were damaged and cut, {lost} tokens are sampled again"
    return buffer, steps or 0, remark


def _steps_of_whole_rollout(path: Path, iteration: int, tokens: int) -> int | None:
    """Decode steps of the rollout of ``iteration``; None: not all of its tokens are there."""
    try:
        noted = json.loads(path.with_name(ROLLOUT).read_text())
        is_whole = (noted["iteration"], noted["tokens"]) == (iteration, tokens)
        return int(noted["decode_steps"]) if is_whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _restore(path: Path, snapshot: Path) -> RolloutBuffer:
    partial = path.with_name(path.name + ".tmp")
    shutil.copyfile(snapshot, partial)
    partial.replace(path)
    return RolloutBuffer.open(path)
