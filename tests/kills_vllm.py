"""Kills whole runs whose engine is vLLM at random moments, resumes them, and compares all tokens.

    python tests/kills_vllm.py --kills 100 --seed 1     # in an environment with vLLM

vLLM does not repeat a run bit for bit, so ``resume = "keep"`` is its default: what was acknowledged
stays. Here each acknowledged segment is written down by the run as soon as the buffer has taken it.
Most kills come within milliseconds of such a line, the others are aimed at a stage as in
``kills.py``. After a few of them the run ends, and then

1. no position of a response was acknowledged twice,
2. each acknowledged token stands at its place with its log-prob, in the one record of its
   response or, if it has not ended, in the buffer,
3. each iteration is there once, and each response that was begun,
4. the trainer's log-prob of each token of the iteration's own version is that of the engine.

Prints a line of counts as JSON, also after Ctrl-C or SIGTERM; its exit status is 1 if a run was not
as it should be.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import vllm.v1.engine.async_llm
import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker
from kills import NUMBERS, STAGES, Marks, kill, kill_at

from kimi_core.buffer import RolloutBuffer
from kimi_core.rollout import phase
from kimi_core.run import curves, run
from kimi_core.run.config_file import load_config

ITERATIONS, PROMPTS, SAMPLES = 5, 4, 3

CONFIG = f"""
name = "killed"
iterations = {ITERATIONS}

[model]
device = "cpu"
[model.scratch]
layers = 1
width = 64
heads = 2
context = 64

[prompts]
source = "multiply"
held_out = 4

[sft]
data = "multiply"
steps = 8
batch_size = 4
save_every = 4

[rollout]
engine = "vllm"
prompts_per_iteration = {PROMPTS}
samples_per_prompt = {SAMPLES}
max_response_tokens = 40
token_budget = 16
stream_tokens = 2
[rollout.vllm.args]
kv_cache_memory_bytes = 16777216
max_model_len = 64
enforce_eager = true

[trainer]
learning_rate = 1e-2
updates_per_iteration = 1

[evaluation]
every = 3
prompts = 2
"""

APPENDS = 100
"""Place of their number among the marks."""

WORST = 1e-3
"""Allowed between a log-prob of vLLM and that of the trainer, nats."""


def start(folder: Path, marks: Marks) -> int:
    """Start or resume the run in a fork; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        fork_vllm()
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        marks.watch()
        note_what_is_acknowledged(folder / "acknowledged.jsonl", marks)
        os.chdir(folder)
        curves.draw_curves = lambda *_: None
        Path("config.toml").write_text(CONFIG)
        run.train(load_config("config.toml", []), resume=True)
        status = 0
    except BaseException:  # noqa: BLE001, a fork must not go on as the parent does.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def fork_vllm() -> None:
    """Have vLLM fork its processes, its default but on a CPU: new interpreters load it for long."""
    forks = multiprocessing.get_context("fork")
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: forks  # type: ignore[attr-defined]


def note_what_is_acknowledged(path: Path, marks: Marks) -> None:
    """After each append of the rollout phase, add a line for each of its segments, and count it."""
    plain, lines = phase._append, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(buffer: RolloutBuffer, columns: Any) -> None:
        keys = columns.trajectory_ids.tolist()
        before = {key: buffer.read(key).response_length for key in set(keys)}
        plain(buffer, columns)
        said = ""
        for key, (begin, end) in zip(keys, pairwise(columns.cu_seqlens.tolist()), strict=True):
            tokens, logprobs = columns.token_ids[begin:end], columns.logprobs[begin:end]
            said += json.dumps([key, before[key], tokens.tolist(), logprobs.tolist()]) + "\n"
            before[key] += len(tokens)
        os.write(lines, said.encode())
        marks.values[APPENDS] += 1

    phase._append = noted


def wait_for_vllm(pid: int) -> None:
    """Wait until vLLM's processes have followed the run: forks hold the lock of its folder."""
    deadline = time.monotonic() + 120
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(pid, 0)
            time.sleep(0.01)
        raise TimeoutError("vLLM's processes have not ended 120 s after the run")


def faults(folder: Path) -> list[str]:
    """What is not as it should be in a run that has ended."""
    path = folder / "runs" / "killed"
    found: list[str] = []
    records: dict[int, dict[str, Any]] = {}
    for number in range(1, ITERATIONS + 1):
        for line in (path / "trajectories" / f"{number:06}.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["trajectory_id"] in records:
                found.append(f"response {record['trajectory_id']} was used twice")
            records[record["trajectory_id"]] = record
            found += _gaps(record)
    kept = {key: (one["token_ids"], one["engine_logprobs"]) for key, one in records.items()}
    with RolloutBuffer.open(path / "buffer.bin", readonly=True) as buffer:
        for info in buffer.trajectories():
            one = buffer.read(info.trajectory_id)
            tokens, logprobs = (
                column[one.prompt_length :].tolist() for column in (one.token_ids, one.logprobs)
            )
            used = records.get(one.trajectory_id)
            if used is None:
                kept[one.trajectory_id] = (tokens, logprobs)
            elif used["iteration"] != ITERATIONS or used["token_ids"] != tokens:
                found.append(f"response {one.trajectory_id} was used and still waits")
    if (begun := ITERATIONS * PROMPTS * SAMPLES) != len(kept):
        found.append(f"{len(kept)} responses were begun, not {begun}")
    metrics = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    numbers = [line["iteration"] for line in metrics if line["kind"] == "iteration"]
    if numbers != list(range(1, ITERATIONS + 1)):
        found.append(f"iterations {numbers}")
    return found + _lost(folder / "acknowledged.jsonl", kept)


def _lost(path: Path, kept: dict[int, tuple[list[int], list[float]]]) -> list[str]:
    found, seen = [], set()
    for line in path.read_text().splitlines():
        key, first, tokens, logprobs = json.loads(line)
        places = {(key, first + n) for n in range(len(tokens))}
        if again := places & seen:
            found.append(f"acknowledged twice: {sorted(again)}")
        seen |= places
        if key not in kept:
            found.append(f"response {key} is gone")
            continue
        stored, nats = (column[first : first + len(tokens)] for column in kept[key])
        if stored != tokens or not _close(nats, logprobs):
            found.append(f"response {key} has other tokens from {first} on")
    return found


def _close(some: list[float], others: list[float]) -> bool:
    """Records have few digits."""
    return len(some) == len(others) and np.allclose(some, others, rtol=1e-3)


def _gaps(record: dict[str, Any]) -> list[str]:
    """Tokens that the trained weights sampled, whose log-probs engine and trainer see otherwise."""
    own = [
        version == record["iteration"] - 1
        for version, count in record["versions"]
        for _ in range(count)
    ]
    pairs = zip(own, record["engine_logprobs"], record["trainer_logprobs"], strict=True)
    worst = max((abs(a - b) for is_own, a, b in pairs if is_own and b is not None), default=0.0)
    return [f"log-probs of {record['trajectory_id']}: {worst:.1e}"] * (worst > WORST)


def kill_after(pid: int, appends: int, marks: Marks, chance: random.Random) -> str:
    """Kill the process when it has appended so often; return its stage, "" if it ended before."""
    deadline = time.monotonic() + 600
    while marks.values[APPENDS] < appends:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return ""
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not append {appends} times in 600 s")
        time.sleep(1e-4)
    time.sleep(chance.uniform(0, 0.02))
    return kill(pid, marks)


def kill_runs(kills: int, chance: random.Random, work: Path, counts: dict[str, Any]) -> None:
    """Kill runs until there were ``kills`` kills."""
    marks = Marks()
    (work / "unbroken").mkdir()
    if os.waitpid(start(work / "unbroken", marks), 0)[1] or (odd := faults(work / "unbroken")):
        raise RuntimeError(f"{odd}\n{(work / 'unbroken' / 'said.txt').read_text()}")
    seconds = {name: float(marks.seconds[number]) for name, number in NUMBERS.items()}
    stages = [name for name in STAGES if name != "reward"]  # It takes no time here.
    while counts["kills"].total() < kills:
        folder = work / f"run{counts['runs']}"
        folder.mkdir()
        pid = 0
        try:
            for _ in range(min(kills, chance.randint(4, 10))):
                marks.clear()
                pid = start(folder, marks)
                # Two thirds of the kills are where tokens can be lost.
                if chance.random() < 0.67:
                    where = kill_after(pid, chance.randint(1, 12), marks, chance)
                else:
                    stage = chance.choice(stages)
                    where = kill_at(pid, stage, marks, seconds[stage], chance)
                counts["kills"].update([where] * bool(where))
                wait_for_vllm(pid)
            pid = start(folder, marks)
            ended = os.waitpid(pid, 0)[1]
        except KeyboardInterrupt:
            with suppress(OSError):  # It has ended.
                kill(pid, marks)
            raise
        said = (folder / "said.txt").read_text().splitlines()[-30:]
        if wrong := ["did not end", *said] if ended else faults(folder):
            counts["wrong"].append({"run": counts["runs"], "faults": wrong})
        lines = (folder / "acknowledged.jsonl").read_text().splitlines()
        counts["tokens"] += sum(len(json.loads(line)[2]) for line in lines)
        counts["runs"] += 1
        shutil.rmtree(folder)
        print(
            f"{counts['runs']} runs, {counts['kills'].total()} kills, "
            f"{counts['tokens']} tokens acknowledged, {len(counts['wrong'])} wrong",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts: dict[str, Any] = {"kills": Counter(), "runs": 0, "tokens": 0, "wrong": []}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as place, suppress(KeyboardInterrupt):
            kill_runs(given.kills, random.Random(given.seed), Path(place), counts)
    finally:
        found = counts | {"kills": counts["kills"].total(), "in": dict(counts["kills"])}
        print(json.dumps(found), flush=True)
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
