"""Ray on two network namespaces as two hosts: a worker on each, and the other host's is killed.

    python tests/cluster/ray_hosts.py FOLDER       # as root, with ray; the transcript is in docs

The hosts are those of ``two_hosts.py``, with a ``/dev/shm`` and a ``/tmp/ray`` for each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.two_hosts import ROOT, SLOW, A, B, Diary, iterations, tokens_of, two_hosts, wait_for
from rewarded_runs import REWARD, SETTINGS, write_files

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
TRAIN = [sys.executable, "-P", "-m", "kimi_core.cli", "train", "tiny.toml", *SETTINGS]
RUN = ["reward.function=reward.py:slow", "iterations=60", "trainer.learning_rate=1e-4"]
ACTOR = b"ray::RolloutActor"


def begin(host: str, folder: Path, name: str, *commands: list[str]) -> subprocess.Popen:
    """Carry out commands on a host, one after the other, with file systems of that host."""
    own = ["/dev/shm", str(folder / "ray")]
    lines = [*(f"mount -t tmpfs none {one}" for one in own)]
    lines += [" ".join(f"'{word}'" for word in words) for words in commands]
    paths = [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, "sh", "-c", " && ".join(lines)],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def on(host: str) -> list[int]:
    """The processes of a host."""
    said = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True)
    return [int(one) for one in said.stdout.split()]


def workers(host: str) -> list[int]:
    """The rollout workers that Ray has started on a host."""
    found = []
    for pid in on(host):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(ACTOR):
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


def story(folder: Path) -> None:
    """Carry out the run, and compare it with one without Ray."""
    diary = Diary()
    for one in ("runs", "ray"):
        (folder / one).mkdir(exist_ok=True)
    common = [f"--temp-dir={folder}/ray", "--num-cpus=1", "--object-store-memory=80000000"]
    head = [*RAY, "--head", f"--node-ip-address={A}", "--port=6379", *common]
    head += ["--include-dashboard=false"]
    joining = [*RAY, f"--address={A}:6379", f"--node-ip-address={B}", "--block", *common[1:]]
    ours = ["cluster.address=auto", "rollout.workers=2", "name=ray"]
    with two_hosts() as (host_a, host_b):
        run = begin(host_a, folder, "a", head, [*TRAIN, *RUN, *ours])
        try:
            wait_for(lambda: "Ray runtime started" in (folder / "a.log").read_text(), "the head")
            diary.note("A: ray start --head, then kimi train ... cluster.address=auto")
            begin(host_b, folder, "b", joining)
            diary.note(f"B: ray start --address={A}:6379")
            wait_for(lambda: workers(host_a) and workers(host_b), "a worker on each host")
            diary.note("Ray has started a worker on each host")
            both = lambda: all(tokens_of(folder, "ray", number) for number in (0, 1))  # noqa: E731
            wait_for(both, "both sample")
            diary.note("both have sampled")
            (killed,) = workers(host_b)
            os.kill(killed, signal.SIGKILL)
            diary.note("kill -9 of the worker on B")
            lost = lambda: sum(one.worker_restarts for one in iterations(folder, "ray"))  # noqa: E731
            wait_for(lost, "the run sees it")
            diary.note("the run has noticed, and goes on")
            wait_for(lambda: {*workers(host_b)} - {killed}, "Ray starts it again")
            diary.note("Ray has started another on B")
            said = lambda: (folder / "a.log").read_text().count("has joined")  # noqa: E731
            wait_for(lambda: said() == 3, "it joins")
            diary.note("it has joined")
            status = run.wait(400)
            diary.note(f"the run has ended with status {status}, {lost()} worker was lost")
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
