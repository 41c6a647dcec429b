"""Ray on two network namespaces as two hosts: a worker and a rank on each; B's are killed.

    python tests/cluster/ray_hosts.py FOLDER       # as root, with ray; the transcript is in docs

The hosts are those of ``two_hosts.py``, with a ``/dev/shm``, a ``/tmp/ray`` and processes of their
own, and B sees an empty folder in place of the run's. After the rank's death the run goes on from
its last state, with new ranks.
"""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.two_hosts import (
    ROOT,
    SLOW,
    WAIT_S,
    A,
    B,
    Diary,
    iterations,
    tokens_of,
    two_hosts,
    wait_for,
)
from rewarded_runs import REWARD, SETTINGS, write_files

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
TRAIN = [sys.executable, "-P", "-m", "kimi_core.cli", "train", "tiny.toml", *SETTINGS]
RUN = ["reward.function=reward.py:slow", "iterations=60", "trainer.learning_rate=1e-4"]
TOKEN = secrets.token_hex(32)
"""For Ray, which asks for one."""
OWN_PROCESSES = "unshare --pid --fork --kill-child --mount-proc"
WORKER, RANK = b"ray::RolloutActor", b"kimi_core.run.follower"


def begin(host: str, folder: Path, name: str, *commands: str) -> subprocess.Popen:
    """Carry out commands on a host, one after the other, with processes and files of that host."""
    own = ["/dev/shm", str(folder / "ray"), *([str(folder / "runs")] if name == "b" else [])]
    lines = [*(f"mount -t tmpfs none {one}" for one in own)]
    lines += commands
    paths = [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*shlex.split(f"ip netns exec {host} {OWN_PROCESSES} sh -c"), " && ".join(lines)],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def on(host: str) -> list[int]:
    """The processes of a host."""
    said = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True)
    return [int(one) for one in said.stdout.split()]


def running(host: str, name: bytes) -> list[int]:
    """The processes of a host that have ``name`` on their command line."""
    found = []
    for pid in on(host):
        try:
            if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:  # It has ended meanwhile.
            pass
    return found


def end(host: str) -> None:
    """End all processes of a host."""
    while pids := on(host):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def kill_one(diary: Diary, folder: Path, host_a: str, host_b: str) -> None:
    """Kill B's worker once both have sampled, and wait until Ray has placed another."""
    for what in (RANK, WORKER):
        wait_for(lambda what=what: running(host_a, what) and running(host_b, what), f"{what!r}")
    diary.note("Ray has started a worker and a rank of the trainer on each host")
    both = lambda: all(tokens_of(folder, "ray", number) for number in (0, 1))  # noqa: E731
    wait_for(both, "both sample")
    diary.note("both workers have sampled")
    (killed,) = running(host_b, WORKER)
    os.kill(killed, signal.SIGKILL)
    diary.note("kill -9 of the worker on B")
    wait_for(lambda: sum(one.worker_restarts for one in iterations(folder, "ray")), "it is seen")
    diary.note("the run has noticed, and goes on")
    wait_for(lambda: {*running(host_b, WORKER)} - {killed}, "Ray starts it again")
    diary.note("Ray has started another on B")
    wait_for(lambda: (folder / "a.log").read_text().count("has joined") == 3, "it joins")
    diary.note("it has joined")


def kill_rank(diary: Diary, folder: Path, host_b: str) -> None:
    """Kill B's rank, and wait until the run goes on with another."""
    (killed,) = running(host_b, RANK)
    os.kill(killed, signal.SIGKILL)
    diary.note("kill -9 of the trainer's rank on B")
    said = lambda: (folder / "a.log").read_text()  # noqa: E731
    wait_for(lambda: "of the trainer on" in said(), "the run names the rank")
    diary.note(next(line for line in said().splitlines() if "of the trainer on" in line))
    done = len(iterations(folder, "ray"))
    wait_for(lambda: {*running(host_b, RANK)} - {killed}, "Ray starts another")
    diary.note("Ray has started another rank on B")
    wait_for(lambda: len(iterations(folder, "ray")) > done, "it goes on")
    diary.note("the run goes on")


def story(folder: Path) -> None:
    """Carry out the run, and compare it with one without Ray."""
    diary = Diary()
    for one in ("runs", "ray"):
        (folder / one).mkdir(exist_ok=True)
    common = ["--num-cpus=2", "--object-store-memory=80000000"]
    head = [*RAY, "--head", f"--node-ip-address={A}", "--port=6379", f"--temp-dir={folder}/ray"]
    head += [*common, "--include-dashboard=false"]
    joining = [*RAY, f"--address={A}:6379", f"--node-ip-address={B}", "--block", *common]
    ours = ["cluster.address=auto", "rollout.workers=2", "trainer.ranks=3", "name=ray"]
    train, go = shlex.join([*TRAIN, *RUN, *ours]), folder / "go"
    waiting = f"until [ -e {go} ]; do sleep 0.1; done"
    a_said = lambda text: (folder / "a.log").read_text().count(text)  # noqa: E731
    with two_hosts() as (host_a, host_b):
        run = begin(host_a, folder, "a", shlex.join(head), waiting, train)
        try:
            wait_for(lambda: a_said("Ray runtime started"), "the head")
            diary.note("A: ray start --head")
            begin(host_b, folder, "b", shlex.join(joining))
            wait_for(lambda: "Ray runtime started" in (folder / "b.log").read_text(), "B joins")
            diary.note(f"B: ray start --address={A}:6379")
            go.touch()
            diary.note("A: kimi train ... " + " ".join(ours[:3]))
            kill_one(diary, folder, host_a, host_b)
            kill_rank(diary, folder, host_b)
            status = run.wait(WAIT_S)
            diary.note(f"the run has ended with status {status}")
            assert status == 0
        finally:
            end(host_a)
            end(host_b)
    subprocess.run([*TRAIN, *RUN, "name=plain"], cwd=folder, check=True, capture_output=True)
    trained = [
        [
            [line[key] for key in ("iteration", "trajectory_id", "token_ids", "versions", "reward")]
            for file in sorted((folder / "runs" / name / "trajectories").glob("*.jsonl"))
            for line in map(json.loads, file.read_text().splitlines())
        ]
        for name in ("ray", "plain")
    ]
    assert trained[0] == trained[1] != []
    diary.note(f"the same {len(trained[0])} responses as in a run without Ray")


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    where.mkdir(parents=True, exist_ok=True)
    write_files(where)
    (where / "reward.py").write_text(REWARD + SLOW)
    story(where)
