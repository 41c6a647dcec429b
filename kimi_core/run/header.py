"""What a run says of itself before it begins, and what to do with it when it has ended."""

from functools import partial
from pathlib import Path

from kimi_core.config import Config
from kimi_core.metrics import IterationMetrics, read_metrics
from kimi_core.run.best import read_best
from kimi_core.run.build import Parts
from kimi_core.run.duration import Sizes, expected
from kimi_core.run.given import GIVEN
from kimi_core.run.report import clock


def header(config: Config, parts: Parts, folder: Path) -> list[str]:
    """Lines about the model, the data, where to look, and the time that the run will take."""
    parameters = list(parts.model.parameters())
    total = sum(one.numel() for one in parameters)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    kind = type(parts.model).__name__
    made = f"{kind} from scratch" if config.model.name == "scratch" else config.model.name
    share = "" if trained == total else f", {trained:,} of them trained"
    examples = f", {len(parts.examples):,} SFT examples" if parts.examples else ""
    sets = [f", {name} ({len(one.prompts):,})" for name, one in parts.sets.items()]
    evaluated = "".join(sets).replace(", ", "; also evaluated: ", 1)
    lines = [
        f"model    {made}, {total:,} parameters{share}, {len(parts.tokenizer):,} tokens, "
        f"{parts.model.dtype}".replace("torch.", "")
        + f" on {parts.model.device}",
        f"data     {config.prompts.source}: {len(parts.train_prompts):,} prompts to train on, "
        f"{len(parts.evaluator.prompts):,} held out{examples}{evaluated}",
        f"look at  kimi dashboard {folder}, or tensorboard --logdir {folder}/tensorboard",
    ]
    done, _ = read_metrics(folder / "metrics.jsonl")
    left = config.iterations - len(done)
    if done and left > 0:
        lines.append(f"time     about {clock(left * _recent_s(done))} for {left} iterations")
    elif not done:
        sizes = partial(_sizes, config, parts)
        lines.append(f"time     {expected(config, parts.model.config, total, sizes)}")
    return lines


def _sizes(config: Config, parts: Parts) -> Sizes:
    return Sizes.of(
        config,
        parts.train_prompts,
        parts.loop.encode,
        parts.codec,
        parts.tokenizer,
        parts.examples,
        parts.evaluator.prompts,
        parts.sets,
    )


def _recent_s(done: list[IterationMetrics]) -> float:
    recent = done[-10:]
    return sum(one.wall_s for one in recent) / len(recent)


def next_steps(config: Config, folder: Path) -> list[str]:
    """Lines that say what the run has made, and commands that go on with it."""
    lines = [f"curves   {folder}/curves.png", f"model    {folder}/checkpoint"]
    if best := read_best(folder):
        lines.append(f"best     {folder}/best: {best}")
    if GIVEN in (config.prompts.source, config.reward.function):
        return lines  # Only the program that gave them can go on.
    settings = f"{folder}/config.toml model.name={folder}/checkpoint"
    return [
        *lines,
        f"try it   kimi chat {folder}",
        f"again    kimi evaluate {settings}",
        f"go on    kimi train {settings} sft.data=none name={folder.name}-more",
    ]
