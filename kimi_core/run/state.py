"""The buffer file that a run works on, and which one belongs to a state.

The live file ``runs/NAME/buffer.bin`` changes with every segment, a state only when it is saved,
with a snapshot of the buffer in it. The file's mark tells whether the two still fit: iteration i+1
begins with these steps, once the state of i is saved if it was due:

1. the mark becomes i, and reaches the disk;
2. what iteration i trained is evicted; the state of i lists it (``consumed``);
3. trajectories begin and grow.

So beside the state of n, a mark of n − 1 means that iteration n was the last to change the file: it
holds what the snapshot holds. A mark of n means that iteration n + 1 has begun: but for what n
consumed, which may be gone or not and is evicted again, all that the snapshot holds is there, with
the tokens sampled since by the weights that the state holds. In both cases the live file is right.
A greater mark means that iterations went by unsaved (``save_every`` > 1): their tokens are of
weights that are lost and what they trained is gone, so the snapshot takes the file's place.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kimi_core.buffer import RolloutBuffer


def start(path: Path, new_buffer: Callable[[Path], RolloutBuffer]) -> RolloutBuffer:
    """An empty live file, in place of one that a run left which never saved a state."""
    path.unlink(missing_ok=True)
    return new_buffer(path)


def nameless(new_buffer: Callable[[Path], RolloutBuffer]) -> RolloutBuffer:
    """An empty buffer outside of any run: its file has no name and goes with the object."""
    with tempfile.TemporaryDirectory() as folder:
        return new_buffer(Path(folder) / "buffer.bin")


def resume(path: Path, snapshot: Path, iteration: int) -> tuple[RolloutBuffer, str]:
    """The buffer to continue the state of ``iteration`` with, and a line that says which it is."""
    try:
        buffer = RolloutBuffer.open(path)
    except FileNotFoundError:
        return _restore(path, snapshot), f"{path} is missing: restored from {snapshot}"
    except ValueError as error:
        return _restore(path, snapshot), f"{error}; restored from {snapshot}"
    if buffer.mark not in (iteration - 1, iteration):
        remark = f"{path} is of iteration {buffer.mark}: restored from {snapshot}"
        buffer.close()
        return _restore(path, snapshot), remark
    stats, cuts = buffer.stats(), buffer.recovery["cuts"]
    remark = f"{path}: {stats.unfinished} unfinished trajectories, {stats.tokens} tokens"
    if cuts:
        lost = sum(lost for _, _, lost in cuts)
        remark += f"; {len(cuts)} were damaged and cut, {lost} tokens are sampled again"
    return buffer, remark


def _restore(path: Path, snapshot: Path) -> RolloutBuffer:
    partial = path.with_name(path.name + ".tmp")
    shutil.copyfile(snapshot, partial)
    partial.replace(path)
    return RolloutBuffer.open(path)
