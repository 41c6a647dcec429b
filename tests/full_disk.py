"""A disk that is full, read-only or gone, at each kind of write of a whole run.

    unshare --mount python tests/full_disk.py FOLDER

Each scenario has a small tmpfs as its runs folder. At one kind of write the disk becomes full
(a file takes all room that is left), read-only, or vanishes (the folder is renamed). The run has to
stop with a line that names the way out. After the fault has gone, the same command has to end with
the bits of a run that nothing stopped. Prints a line of JSON: the messages, and what went wrong.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills

from kimi_core.cli import settings
from kimi_core.run import curves, run, state
from kimi_core.run.report import JsonLines, Report, TensorBoard
from kimi_core.run.trajectories import TrajectoryFiles

WRITES: dict[str, tuple[Any, str, int]] = {
    "start": (run, "build", 1),
    "state of SFT": (kills.States, "save", 1),
    "buffer growth": (run.Loop, "_begin", 1),
    "rollout note": (state, "note_rollout", 2),
    "trajectories": (TrajectoryFiles, "write", 2),
    "samples": (TrajectoryFiles, "write_samples", 1),
    "metrics": (JsonLines, "take", 3),
    "TensorBoard": (TensorBoard, "take", 3),
    "state": (kills.States, "save", 5),
    "state of the last iteration": (kills.States, "save", 8),
    "evaluation": (Report, "evaluation", 2),
    "checkpoint": (kills.RunFolder, "save_checkpoint", 1),
    "summary": (Report, "close", 1),
}
"""Kind of write → what is called before it, and which of its calls the fault precedes."""


def fill(runs: Path) -> None:
    with (runs / "other").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def make_room(runs: Path) -> None:
    (runs / "other").unlink(missing_ok=True)


def read_only(runs: Path) -> None:
    """Put a read-only view over the folder: a disk with open files cannot be mounted otherwise."""
    view = runs.with_name("view")
    view.mkdir(exist_ok=True)
    for command in (
        ["--bind", runs, view],
        ["-o", "remount,bind,ro", view],
        ["--bind", view, runs],
    ):
        subprocess.run(["mount", *command], check=True)


def writable(runs: Path) -> None:
    for path in (runs, runs.with_name("view")):
        subprocess.run(["umount", path], check=False)


def vanish(runs: Path) -> None:
    if (runs / "killed").exists():
        (runs / "killed").rename(runs / "elsewhere")


def come_back(runs: Path) -> None:
    if (runs / "elsewhere").exists():
        (runs / "elsewhere").rename(runs / "killed")


FAULTS = {
    "full": (fill, make_room, "ake room there"),
    "read-only": (read_only, writable, "the disk is read-only"),
    "vanished": (vanish, come_back, "has vanished"),
}
"""Kind → how it comes, how it goes, and what is said."""


def main(place: Path) -> int:
    outcomes: dict[str, Any] = {}
    wanted, _ = kills.unbroken(place / "unbroken", "budget", fresh=False)
    for fault in FAULTS:
        for write in WRITES:
            if fault != "full" and write not in ("buffer growth", "metrics", "state", "checkpoint"):
                continue
            folder = place / f"{fault} {write}"
            outcomes[folder.name] = scenario(folder, fault, write, wanted)
            print(folder.name, json.dumps(outcomes[folder.name]), file=sys.stderr, flush=True)
    print(json.dumps(outcomes))
    return 0


def scenario(folder: Path, fault: str, write: str, wanted: dict[str, Any]) -> dict[str, Any]:
    come, go, _ = FAULTS[fault]
    runs = folder / "runs"
    runs.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(runs)]
    subprocess.run(mount, check=True)
    try:
        status = in_fork(folder, lambda: before(write, lambda: come(runs)))
        said = (folder / "said.txt").read_text()
        go(runs)
        status_after = in_fork(folder, lambda: None)
        found = kills.left(folder) if status_after == 0 else {}
        differ = [key for key in wanted if found.get(key) != wanted[key]][:3]
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        return {
            "status": status,
            "said": errors[-1] if errors else said[-2000:],
            # TensorBoard writes in a thread, which may print its own, and that of a cause with it.
            "traceback": said.count("Traceback")
            > said.count("Exception in thread") + said.lower().count("the above exception"),
            "after": status_after,
            "differ": differ,
            "said after": (folder / "said.txt").read_text()[-2000:] if differ else "",
        }
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


def in_fork(folder: Path, prepare: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 99
    try:
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        curves.draw_curves = lambda *_: None  # It takes longer than all the rest.
        Path("config.toml").write_text(kills.CONFIG)
        Path("reward.py").write_text(kills.REWARD)
        prepare()
        given = ["config.toml", *kills.KINDS["budget"]]
        status = settings.with_config(given, lambda config: run.train(config, resume=True) and None)
    except BaseException:  # noqa: BLE001, a fork must not go on as the parent does.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def before(write: str, happens: Callable[[], None]) -> None:
    """Let something happen before the right call of that kind of write."""
    owner, name, wanted = WRITES[write]
    plain, calls = getattr(owner, name), []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == wanted:
            happens()
        return plain(*args, **kwargs)

    setattr(owner, name, patched)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
