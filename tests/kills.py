"""Kills whole runs with ``kill -9`` at random moments, resumes them, and compares all that is left.

    python tests/kills.py --kills 100 --seed 1

Each run is killed a few times and resumed by the same command until it ends. Then the bits of
everything that it left, except times, must be those of a run that nothing stopped. A kill is aimed
at a stage (SFT, rollout, reward, training, save, the disk that takes a state meanwhile, evaluation,
last checkpoint): the run marks the stage that it is in, in shared memory, and is killed a random
part of that stage's time after it has entered it.

Runs are forks of one process that has loaded everything; ``--fresh`` starts an interpreter for
each. Prints a line of counts as JSON, also after Ctrl-C or SIGTERM; its exit status is 1 if a run
was not as it should be.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.tensorboard  # noqa: F401, a run loads it slowly.
import transformers.models.llava.modeling_llava  # noqa: F401
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vision_testing import save_model, write_data

from kimi_core.buffer import RolloutBuffer
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.reward.groups import GroupScorer
from kimi_core.run import curves, run
from kimi_core.run.config_file import load_config
from kimi_core.run.folder import RunFolder
from kimi_core.run.states import States
from kimi_core.trainer.sft import SftPhase
from kimi_core.trainer.trainer import Trainer

CONFIG = """
name = "killed"
iterations = 5

[model]
device = "cpu"
[model.scratch]
layers = 1
width = 16
heads = 2
context = 64

[prompts]
source = "retrieve"
held_out = 6
[prompts.task]
count = 40
numbers = 2
length = 20

[sft]
data = "retrieve"
steps = 12
batch_size = 4
save_every = 5

[rollout]
prompts_per_iteration = 3
samples_per_prompt = 3
max_response_tokens = 24
batch_rows = 8

[reward]
function = "reward.py:of_lengths"
length_weight = 0.5

[trainer]
learning_rate = 1e-2

[evaluation]
every = 2
prompts = 4
samples = 2
best = "held_out/sampled"
"""

REWARD = """
def of_lengths(prompt, text):
    return float(len(text) % 3 == 0)
"""

KINDS = {
    "budget": [
        "rollout.token_budget=7",
        "rollout.stream_tokens=2",
        "evaluation.sets.second.source=retrieve",
        "evaluation.sets.second.prompts=3",
    ],
    "whole": ["rollout.stream_tokens=3", "save_every=2", "trajectories.every=2"],
    "images": [
        "rollout.token_budget=7",
        "rollout.stream_tokens=2",
        "model.name=model",
        "prompts.source=pictures.jsonl",
        "sft.data=sft.jsonl",
    ],
    "bfloat16": ["rollout.token_budget=9", "rollout.stream_tokens=1", "model.dtype=bfloat16"],
}
"""Names of configs → settings."""

STAGES: dict[str, tuple[Any, str]] = {
    "sft": (SftPhase, "fit"),
    "rollout": (run.state.Loop.iterate.__globals__, "roll_out"),
    "reward": (GroupScorer, "judge"),
    "training": (Trainer, "train"),
    "save": (States, "save"),
    "disk": (States, "_force"),
    "evaluation": (Evaluator, "evaluate"),
    "checkpoint": (RunFolder, "save_checkpoint"),
}
NUMBERS = {name: number for number, name in enumerate(STAGES, 1)}
TIMES = ("wall_s", "cpu_s", "rollout_s", "train_s", "tokens_per_s", "sft_s", "turn_s")


class Marks:
    """The stage that a run is in, how often each was entered, and its seconds, in shared memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.values = np.frombuffer(self._memory, np.float64)
        self.entered = self.values[16:]
        self.seconds = self.values[32:]

    def clear(self) -> None:
        self.values[:] = 0

    @property
    def stage(self) -> str:
        return ["elsewhere", *STAGES][int(self.values[1] or self.values[0])]

    def watch(self) -> None:
        """Mark the stages of this process."""
        for name, (owner, attribute) in STAGES.items():
            is_module = isinstance(owner, dict)
            plain = owner[attribute] if is_module else getattr(owner, attribute)
            # A thread waits for the disk: its mark does not touch that of the run.
            marked = self._marked(plain, NUMBERS[name], place=int(name == "disk"))
            if is_module:
                owner[attribute] = marked
            else:
                setattr(owner, attribute, marked)

    def _marked(self, plain: Callable[..., Any], number: int, place: int) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            before, started = self.values[place], time.perf_counter()
            self.values[place] = number
            self.entered[number] += 1
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[number] = time.perf_counter() - started
                self.values[place] = before

        return marked


def start(folder: Path, kind: str, marks: Marks, fresh: bool) -> int:
    """Start or resume the run in a process; return its pid."""
    if fresh:
        command = [sys.executable, __file__, "--run", kind, "--folder", str(folder)]
        with (folder / "said.txt").open("a") as said:
            return subprocess.Popen(command, stdout=said, stderr=said).pid
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        marks.watch()
        carry_out(folder, kind)
        status = 0
    except BaseException:  # noqa: BLE001, a fork must not go on as the parent does.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def carry_out(folder: Path, kind: str) -> None:
    """The run, from whatever is there."""
    os.chdir(folder)
    curves.draw_curves = lambda *_: None  # It takes longer than all the rest.
    Path("config.toml").write_text(CONFIG)
    Path("reward.py").write_text(REWARD)
    if kind == "images" and not Path("model").is_dir():
        write_data(Path())
        save_model(Path("model.part"))
        Path("model.part").rename("model")  # A killed process leaves no half model.
    run.train(load_config("config.toml", KINDS[kind]), resume=True)


def kill_at(pid: int, stage: str, marks: Marks, seconds: float, chance: random.Random) -> str:
    """Kill the process within ``stage``; return the stage that it was in, "" if it ended before."""
    wanted = 1 if stage in ("sft", "checkpoint") else chance.randint(1, 3)
    deadline = time.monotonic() + 600
    while marks.entered[NUMBERS[stage]] < wanted:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return ""
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not enter {stage} in 600 s")
        time.sleep(2e-4)
    time.sleep(chance.uniform(0, 1.2 * seconds))
    return kill(pid, marks)


def kill(pid: int, marks: Marks) -> str:
    """Kill the process; return the stage that it was in, "" if it had ended."""
    os.kill(pid, signal.SIGKILL)
    return marks.stage if os.WIFSIGNALED(os.waitpid(pid, 0)[1]) else ""


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run left, by name, without times."""
    path = folder / "runs" / "killed"
    found: dict[str, Any] = {"files": names(path)}
    folders = ("trajectories", "samples", "checkpoint", "best")
    for file in (file for name in folders for file in (path / name).glob("*")):
        found[str(file.relative_to(path))] = file.read_bytes()
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [timeless(line) for line in lines if line["kind"] != "resume"]
    found["summary"] = timeless(json.loads((path / "summary.json").read_text()))
    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if not tag.endswith(TIMES) and "turn_s" not in tag:
            found[tag] = [(one.step, one.value) for one in events.Scalars(tag)]
    found["buffer"] = trajectories(path / "buffer.bin")
    for state in path.glob("states/*"):
        found[f"{state.name} buffer"] = trajectories(state / "buffer.bin")
        found[f"{state.name} state"] = timeless(json.loads((state / "state.json").read_text()))
        tensors = load_file(state / "tensors.safetensors")
        found[f"{state.name} tensors"] = {k: v.numpy().tobytes() for k, v in tensors.items()}
        with np.load(state / "curriculum.npz") as rates:
            found[f"{state.name} rates"] = {key: rates[key].tolist() for key in rates}
    return found


def names(path: Path) -> list[str]:
    every = (str(file.relative_to(path)) for file in path.rglob("*"))
    return sorted(name for name in every if "tfevents" not in name)


def timeless(record: Any) -> Any:
    """Without times, and without checksums of files with times."""
    left_out = (*TIMES, "records")
    if isinstance(record, dict):
        return {key: timeless(value) for key, value in record.items() if key not in left_out}
    return record


def trajectories(path: Path) -> list[list[Any]]:
    with RolloutBuffer.open(path, readonly=True) as buffer:
        every = [buffer.read(info.trajectory_id) for info in buffer.trajectories()]
    return [
        [value.tobytes() if hasattr(value, "tobytes") else value for value in vars(one).values()]
        for one in every
    ]


def unbroken(folder: Path, kind: str, fresh: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """What a run leaves that nothing stops, and the seconds of its stages if it is not fresh."""
    marks = Marks()
    folder.mkdir()
    if os.waitpid(start(folder, kind, marks, fresh), 0)[1]:
        raise RuntimeError((folder / "said.txt").read_text())
    return left(folder), {name: float(marks.seconds[number]) for name, number in NUMBERS.items()}


def killed_run(
    folder: Path, kind: str, seconds: dict[str, float], chance: random.Random, fresh: bool
) -> tuple[list[str], list[str]]:
    """Kill a run a few times, then let it end.

    Returns the stages in which it was killed, and its last lines if it could not end.
    """
    marks, stages, pid = Marks(), [], 0
    folder.mkdir()
    try:
        for _ in range(chance.randint(1, 6)):
            marks.clear()
            pid = start(folder, kind, marks, fresh)
            if fresh:
                time.sleep(chance.uniform(0, 20))
                stages.append(kill(pid, marks))
            else:
                stage = chance.choice(list(STAGES))
                stages.append(kill_at(pid, stage, marks, seconds[stage], chance))
        pid = start(folder, kind, marks, fresh)
        status = os.waitpid(pid, 0)[1]
    except KeyboardInterrupt:
        with suppress(OSError):  # It has ended.
            kill(pid, marks)
        raise
    said = (folder / "said.txt").read_text().splitlines()[-30:] if status else []
    return [stage for stage in stages if stage], said


@dataclass
class Counts:
    """What came of all runs so far."""

    kills: Counter[str] = field(default_factory=Counter)
    """By stage."""
    runs: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    """Each run that differs from the unbroken one, or did not end: where, and what it said."""


def kill_runs(kills: int, chance: random.Random, fresh: bool, work: Path, counts: Counts) -> None:
    """Kill runs until there were ``kills`` kills."""
    expected = {kind: unbroken(work / kind, kind, fresh=False) for kind in KINDS}
    first = next(iter(KINDS))
    assert unbroken(work / "fresh", first, fresh=True)[0] == expected[first][0]
    while counts.kills.total() < kills:
        kind = list(KINDS)[counts.runs % len(KINDS)]
        folder = work / f"run{counts.runs}"
        stages, said = killed_run(folder, kind, expected[kind][1], chance, fresh)
        found, wanted = {} if said else left(folder), expected[kind][0]
        if differ := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
            odd = sorted(set(wanted["files"]) ^ set(found.get("files", ())))
            about = {"run": counts.runs, "kind": kind, "killed in": stages, "said": said}
            counts.wrong.append(about | {"differ": differ[:20], "files of one only": odd[:20]})
        counts.kills.update(stages)
        counts.runs += 1
        shutil.rmtree(folder)
        so_far = f"{counts.runs} runs, {counts.kills.total()} kills, {len(counts.wrong)} wrong"
        print(so_far, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="an interpreter for each process")
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        carry_out(given.folder, given.run)
        return 0
    counts, chance = Counts(), random.Random(given.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as place, suppress(KeyboardInterrupt):
            kill_runs(given.kills, chance, given.fresh, Path(place), counts)
    finally:
        found = {"kills": counts.kills.total(), "runs": counts.runs, "wrong": counts.wrong}
        print(json.dumps(found | {"in": dict(counts.kills)}), flush=True)
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
