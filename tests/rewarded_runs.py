"""Tiny runs that earn rewards, carried out in other ways and looked at while they go on."""

import json
import os
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console
from tiny_runs import TINY
from warm import Warm

import kimi_core
from kimi_core.metrics import IterationMetrics, read_metrics
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train

SETTINGS = [
    "sft.steps=3",
    "rollout.token_budget=5",
    "reward.function=reward.py:some",
    "trainer.learning_rate=1e-3",
    "trainer.ranks_timeout_s=240",
]
REWARD = """
def some(prompt, response):
    return sum(character in "1234" for character in response) / 8
"""
WAIT_S = 400


def write_files(folder: Path) -> None:
    """The config ``tiny.toml`` and the reward of ``SETTINGS``."""
    (folder / "tiny.toml").write_text(TINY)
    (folder / "reward.py").write_text(REWARD)


def go_on(*overrides: str) -> str:
    """Carry out a run of the working folder, or go on with it; what it said."""
    config = load_config("tiny.toml", [*SETTINGS, *overrides])
    said = StringIO()
    train(config, resume=True, console=Console(file=said))
    return said.getvalue()


def command(*overrides: str) -> Warm:
    """The same in another process."""
    kimi = ["-m", "kimi_core.cli", "train", "--resume", "tiny.toml"]
    root = str(Path(kimi_core.__file__).parents[1])
    return Warm([*kimi, *SETTINGS, *overrides], env=os.environ | {"PYTHONPATH": root})


def iterations(name: str) -> list[IterationMetrics]:
    """What the iterations of a run recorded; a later line replaces an earlier one."""
    if not Path(f"runs/{name}/metrics.jsonl").exists():
        return []
    found = {one.iteration: one for one in read_metrics(f"runs/{name}/metrics.jsonl")[0]}
    return [found[number] for number in sorted(found)]


def sampled(name: str) -> list[list]:
    """Iteration, trajectory, tokens, versions and reward of everything that was trained."""
    same = ("iteration", "trajectory_id", "token_ids", "versions", "reward")
    files = sorted(Path(f"runs/{name}/trajectories").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [[line[key] for key in same] for line in lines]


def children(pid: int, module: str) -> list[int]:
    """The children of a process that run a module of ours."""
    found = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").glob("*/children")
        for child in thread.read_text().split()
    ]
    name = module.encode()
    return [child for child in found if name in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(what: Callable[[], object]) -> None:
    """Wait until it is so, at most ``WAIT_S``."""
    ends = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.002)
