"""Two network namespaces as two hosts, joined by a pair of virtual interfaces.

    python tests/cluster/two_hosts.py FOLDER       # as root; writes docs/two_hosts.md's transcript

The run is on host A, and a worker on host B. The link is cut for 3 s, then for good until the run
has noticed; after that it is mended, and the worker joins again. Both processes have file systems
of their own, too: B sees an empty folder in place of the run's.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import kimi_core
from kimi_core.metrics import read_metrics

A, B = "10.231.7.1", "10.231.7.2"
PORT = 29500
WAIT_S = 400
SLOW = """
import time

def slow(prompt, response):
    time.sleep(0.1)
    return some(prompt, response)
"""
"""A reward that takes time and no CPU, so that the run lasts longer than the cuts."""

SETTINGS = [
    "reward.function=reward.py:slow",
    "iterations=80",
    "evaluation.every=1000",
    "trainer.learning_rate=1e-4",
]
ROOT = str(Path(kimi_core.__file__).parents[1])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with the addresses ``A`` and ``B``."""
    names = tuple(f"kimi{letter}{os.getpid()}" for letter in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            names[1],
        )
        for name, address in zip(names, (A, B), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def cut(host: str, *, is_cut: bool) -> None:
    """Take the host off the network, or put it back; nobody is told."""
    ip("-n", host, "link", "set", "eth0", "down" if is_cut else "up")


class Diary:
    """What happened when: one line for each thing, in seconds from the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lines: list[str] = []

    def note(self, text: str) -> float:
        now = time.monotonic()
        self.lines.append(f"{now - self.start:7.1f} s  {text}")
        print(self.lines[-1], flush=True)
        return now


class Host:
    """A command of ours on a host, and what it prints."""

    def __init__(self, host: str, folder: Path, name: str, *words: str) -> None:
        self.log = folder / f"{name}.log"
        self.out: IO[bytes] = self.log.open("wb")
        own = ["/dev/shm", *([str(folder / "runs")] if name == "worker" else [])]
        line = " && ".join(f"mount -t tmpfs none {one}" for one in own) + ' && exec "$@"'
        enter = ["ip", "netns", "exec", host, "sh", "-c", line, "sh"]
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-P", "-m", "kimi_core.cli", *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
            stdout=self.out,
            stderr=subprocess.STDOUT,
        )

    def said(self, text: str) -> int:
        """How often it has printed ``text``."""
        return self.log.read_text().count(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()


def wait_for(what: Callable[[], object], why: str) -> None:
    ends = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < ends, why
        time.sleep(0.02)


def iterations(folder: Path, name: str) -> list:
    path = folder / "runs" / name / "metrics.jsonl"
    return read_metrics(path)[0] if path.exists() else []


def tokens_of(folder: Path, name: str, worker: int) -> int:
    """Tokens that a worker sampled so far."""
    return sum(one.worker_tokens.get(str(worker), 0) for one in iterations(folder, name))


def story(folder: Path, settings: list[str]) -> dict[str, float]:
    """Carry out a run with a worker on another host, and return what took how long."""
    diary, took, name = Diary(), {}, "two"
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "token").write_text("0123456789abcdef" * 2)
    cluster = [f"cluster.listen={A}:{PORT}", "cluster.token_file=token"]
    joining = ["worker", "--connect", f"{A}:{PORT}", "--token-file", "token", "--name", "b"]
    with two_hosts() as (host_a, host_b):
        train = ["train", "tiny.toml", *settings, *cluster, f"name={name}"]
        run = Host(host_a, folder, "run", *train)
        worker = Host(host_b, folder, "worker", *joining)
        try:
            diary.note("A: kimi train ...; B: kimi worker ...")
            wait_for(lambda: tokens_of(folder, name, 1), "the worker took part")
            diary.note(f"B has sampled {tokens_of(folder, name, 1)} tokens")

            cut(host_b, is_cut=True)
            diary.note("the link is cut")
            time.sleep(3)
            cut(host_b, is_cut=False)
            before = tokens_of(folder, name, 1)
            diary.note("the link is there again, after 3 s")
            wait_for(lambda: tokens_of(folder, name, 1) > before, "B went on after a short cut")
            took["losses after 3 s"] = run.said("may join again")
            diary.note(f"B goes on; it was lost {took['losses after 3 s']} times")

            cut(host_b, is_cut=True)
            gone = diary.note("the link is cut for good")
            lost = "may join again"
            wait_for(lambda: run.said(lost) or run.said("did not get version"), "B was missed")
            took["seen after"] = time.monotonic() - gone
            diary.note(f"A has noticed after {took['seen after']:.1f} s")
            done = len(iterations(folder, name))
            wait_for(lambda: len(iterations(folder, name)) >= done + 3, "the run went on")
            diary.note("A has done 3 more iterations alone")
            wait_for(lambda: run.said(lost), "B was given up")

            before = tokens_of(folder, name, 1)
            cut(host_b, is_cut=False)
            back = diary.note("the link is there again")
            wait_for(lambda: tokens_of(folder, name, 1) > before, "B joined again")
            took["back after"] = time.monotonic() - back
            diary.note(f"B has joined again and samples, after {took['back after']:.1f} s")
            took["run"] = run.process.wait(WAIT_S)
            took["worker"] = worker.process.wait(WAIT_S)
            diary.note(f"the run has ended with status {took['run']}, B with {took['worker']}")
        finally:
            run.close()
            worker.close()
    return took


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import rewarded_runs

    where = Path(sys.argv[1]).resolve()
    where.mkdir(parents=True, exist_ok=True)
    rewarded_runs.write_files(where)
    (where / "reward.py").write_text(rewarded_runs.REWARD + SLOW)
    print(story(where, [*rewarded_runs.SETTINGS, *SETTINGS, *sys.argv[2:]]))
