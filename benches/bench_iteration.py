"""Whole iterations beside TRL's GRPOTrainer and a plain loop, CPU seconds a sample, one thread.

pip install trl==1.16.0                           # needed for the comparison with TRL
pytest benches/bench_iteration.py -k think        # 3 minutes, 2 more for the SFT start
pytest benches/bench_iteration.py -k smollm2
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from experiments import mixed_start
from iteration_peers import Gemms, Plain, Task, Trl

from kimi_core.config import Config
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.prompts.load import load_prompts, split
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.types import Prompt


@dataclass
class Side:
    """What one side took and made in the measured iterations."""

    seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)

    def add(self, seconds: float, lengths: Sequence[int]) -> None:
        self.seconds += seconds
        self.lengths += lengths

    @property
    def per_sample(self) -> float:
        return self.seconds / len(self.lengths)

    @property
    def per_token(self) -> float:
        return self.seconds / sum(self.lengths)

    def __str__(self) -> str:
        return (
            f"{1e3 * self.per_sample:.1f} CPU-ms a sample, {len(self.lengths)} samples of "
            f"{np.mean(self.lengths):.1f} tokens"
        )


class GivenPrompts(Curriculum):
    """A curriculum that draws as ever, and then gives the prompts that all sides get."""

    turns: list[list[Prompt]]

    def draw(self, count: int, *, iteration: int, rng: np.random.Generator) -> list[Prompt]:
        super().draw(count, iteration=iteration, rng=rng)
        return self.turns[iteration]


class Ours:
    def __init__(self, task: Task) -> None:
        parts = build(task.config)
        self.loop, self.close = parts.loop, parts.close
        curriculum = GivenPrompts(parts.train_prompts, task.config.curriculum)
        curriculum.turns = task.turns
        self.loop.curriculum = curriculum
        self.loop.start()

    def iterate(self, _: Sequence[Prompt]) -> list[int]:
        self.loop.iterate()
        groups = self.loop.latest.groups
        return [one.response_length for group in groups for one in group.trajectories]


def task_of(config: Config, iterations: int) -> Task:
    """The task with prompts drawn at random, none of them twice."""
    everything = load_prompts(config.prompts)
    prompts, _ = split(everything, config.prompts.held_out, config.prompts.split_seed)
    count = config.rollout.prompts_per_iteration
    drawn = np.random.default_rng(0).permutation(len(prompts))[: iterations * count]
    turns = [[prompts[index] for index in turn] for turn in drawn.reshape(iterations, count)]
    return Task(config, turns)


def compare(task: Task, rows: int, folder: Path) -> dict[str, Side]:
    """Run all sides in turn, iteration by iteration; the first iteration warms up."""
    ours, plain, gemms = Ours(task), Plain(task), Gemms(task)
    sides = {name: Side() for name in ("ours", "plain loop", "gemm", "TRL")}

    def timed(number: int, name: str, iterate: Callable[[], Sequence[int]]) -> Sequence[int]:
        start = time.process_time()
        lengths = iterate()
        seconds = time.process_time() - start
        assert len(lengths) == task.responses
        if number:
            sides[name].add(seconds, lengths)
        return lengths

    def others(number: int) -> None:
        prompts = task.turns[number]
        made = timed(number, "ours", lambda: ours.iterate(prompts))
        timed(number, "plain loop", lambda: plain.iterate(prompts))
        timed(number, "gemm", lambda: gemms.iterate(prompts, made))

    if find_spec("trl"):
        trl = Trl(task, rows, folder)
        began = 0.0

        def begin(number: int) -> None:
            nonlocal began
            others(number)
            began = time.process_time()

        def end(number: int) -> None:
            seconds = time.process_time() - began
            assert len(trl.lengths) == task.responses
            if number:
                sides["TRL"].add(seconds, trl.lengths)

        trl.run(begin, end)
    else:
        for number in range(len(task.turns)):
            others(number)
    ours.close()
    return sides


def record(ratios, title: str, sides: dict[str, Side], minimum: float) -> None:
    ours = sides["ours"]
    for peer in ("TRL", "plain loop", "gemm"):
        side = sides[peer]
        if not side.lengths:
            ratios.record(title, peer, float("nan"), None, "missing: pip install trl==1.16.0")
            continue
        needed = minimum if peer == "TRL" else None
        detail = f"{ours} against {side}"
        ratios.record(title, peer, side.per_sample / ours.per_sample, needed, detail)
        if peer != "gemm":
            ratios.record(f"{title}, per token", peer, side.per_token / ours.per_token)


@pytest.mark.usefixtures("one_thread")
def test_think(ratios, tmp_path):
    config = load_config("configs/think.toml", mixed_start(0))
    record(ratios, "think", compare(task_of(config, 4), 128, tmp_path), 3.5)


@pytest.mark.usefixtures("one_thread")
def test_smollm2(ratios, tmp_path):
    config = load_config("configs/smollm2.toml")
    record(ratios, "smollm2", compare(task_of(config, 2), 16, tmp_path), 2.0)
