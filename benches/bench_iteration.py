"""Whole iterations beside TRL's GRPOTrainer and a plain loop, in CPU seconds a sample.

    pip install trl==1.16.0                      # not in '.[bench]': it brings pyarrow and pandas
    pytest benches/bench_iteration.py -k think   # a minute; 2 more for the SFT start, taken once
    pytest benches/bench_iteration.py -k smollm2 # 12 CPU minutes

All sides have the same weights and frozen layers (`think`: the SFT start of seed 0, in
runs/experiments), the same prompts in the same order, and the same number of responses a prompt.
Length limit, temperature, learning rate, number of updates, clipping of the gradient and reward
function are the same, too; the reward's time counts. Nobody evaluates, saves or logs. Each side
trains its copy of the model, in turn with the others, iteration by iteration, in one process and on
one thread. The first iteration warms up.

*Ours* is ``Loop.iterate`` with the parts of a run; only the buffer's file has no name. The rollout
computes a prompt once for its responses, and so does training where that halves the tokens: for
`smollm2`. A response that has ended leaves the batch. The log-probs of the engine are the
reference, and are compared with the trainer's. Responses are packed into rows, in micro-batches of
``trainer.tokens_per_micro_batch``. Neither config has a token budget, so no rollout is partial.

*TRL* generates all responses in one batch, whose rows all run to the longest response. Two updates
from one batch of responses make it compute the old log-probs in a forward pass more. Micro-batches
are padded to the longest response of the iteration. For `think`, micro-batches of 16 to 128
responses took the same time. The loss is TRL's default, and the optimizer keeps its moments. TRL
computes its metrics although nobody reads them.

*The plain loop* has our loss, and is about what one writes by hand: ``generate``, then padded
forward and backward passes of as many tokens as ours. It takes the reference from the logits of
``generate``, and a micro-batch is only as wide as its longest response.

What differs besides: ours ends a response also if it repeats itself, which hardly happens here, and
at a ``$`` inside a longer token. Sides draw other numbers, so lengths differ a little. The table
has them, and a ratio per sampled token.

*gemm* is the limit: the matrix products of the iteration that ours did, with prompts computed once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from figures.runs import Runs
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
    """The loop of a run, without a folder."""

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
    """Run all sides in turn, iteration by iteration; the first iteration warms up.

    TRL's trainer cannot be stopped between two iterations, so its callback runs the others there.

    Args:
        rows: responses in a micro-batch of TRL.
    """
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
    """Add a line for each peer, and one per sampled token; ``minimum`` is for TRL, per sample."""
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
    # From the SFT start of the default run, whose samples are in part right.
    start = Runs().sft("start-0", "think", "seed=0") / "checkpoint"
    config = load_config("configs/think.toml", [f"model.name={start}", "sft.data=none"])
    record(ratios, "think", compare(task_of(config, 4), 128, tmp_path), 3.5)


@pytest.mark.usefixtures("one_thread")
def test_smollm2(ratios, tmp_path):
    config = load_config("configs/smollm2.toml")
    record(ratios, "smollm2", compare(task_of(config, 2), 16, tmp_path), 2.0)
