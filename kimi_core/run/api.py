"""``kimi_core.train``: a run from a notebook or a script.

from kimi_core import Config, Prompt, train

def reward(prompt: Prompt, response: str) -> float:
    return float(response == prompt.answer)

words = ["tea", "sun", "rain", "moon"]
result = train(
    Config(name="mirror", prompts={"held_out": 1}),
    prompts=[(word, word[::-1]) for word in words],
    examples=[(word, word[::-1]) for word in words[:2]],
    reward=reward,
)
result.evaluations[-1].accuracy_greedy, result.curves, result.checkpoint
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.config import Config
from kimi_core.metrics import EvaluationMetrics, IterationMetrics, read_metrics
from kimi_core.models.load import load_pretrained
from kimi_core.reward.base import RewardFunction
from kimi_core.run.given import Given
from kimi_core.run.run import train as train_run
from kimi_core.types import Prompt

Prompts = Sequence[Prompt | tuple[str, str]]
"""Prompts, or (text, answer) pairs."""


@dataclass(frozen=True)
class Result:
    """What a run has made. A notebook shows it as the curves of the run."""

    folder: Path
    """The run folder; docs/metrics.md describes its files."""
    iterations: list[IterationMetrics]
    evaluations: list[EvaluationMetrics]
    """On held-out prompts; the first is from before RL, the last from after it."""

    @property
    def curves(self) -> Path:
        """The picture of the run."""
        return self.folder / "curves.png"

    @property
    def checkpoint(self) -> Path:
        """The trained model in Hugging Face format; `model.name` takes it."""
        return self.folder / "checkpoint"

    @property
    def best(self) -> Path | None:
        """The model of the best evaluation, as `evaluation.best` counts; None: it is not set."""
        folder = self.folder / "best"
        return folder if folder.is_dir() else None

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The trained model in eval mode, and its tokenizer."""
        return load_pretrained(str(self.checkpoint))

    def __repr__(self) -> str:
        before, after = self.evaluations[0], self.evaluations[-1]
        return (
            f"Result(folder='{self.folder}', iterations={len(self.iterations)}, "
            f"accuracy_greedy {before.accuracy_greedy:.3f} → {after.accuracy_greedy:.3f}, "
            f"length_mean {before.length_mean:.1f} → {after.length_mean:.1f})"
        )

    def _repr_png_(self) -> bytes | None:
        return self.curves.read_bytes() if self.curves.is_file() else None


def train(
    config: Config | None = None,
    *,
    prompts: Prompts | Callable[[], Prompts] | None = None,
    reward: RewardFunction | None = None,
    examples: Sequence[tuple[str, str]] | Callable[[list[Prompt]], Any] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
) -> Result:
    """Carry out a run, and return what it has made.

    What is not given is named in ``config``. The run folder is that of any run, and ``resume``
    continues it bit for bit if the same things are given. Prompts and examples are compared by
    their content, a function by its source (``run/given.py``).

    Args:
        config: None: the settings that ``Config()`` has.
        prompts: in place of ``prompts.source``: a list, or a function that makes one.
        reward: in place of ``reward.function``: called with a ``Prompt`` and the response's text,
            returns a number or a ``Score``. It runs in threads of this process, so a call that
            never returns cannot be ended; ``file.py:function`` in the config runs apart.
        examples: in place of ``sft.data``: (prompt, response) pairs, or a function that makes them
            from the training prompts.
        resume: continue the run in that folder, or start it if there is none yet.
        accept_changes: continue it also if something that it reads has changed.
        console: where progress goes; standard output, or the notebook, unless given.

    Raises:
        ValueError: an argument, a setting or a file cannot work. Raised before training.
        Others: as ``kimi_core.run.run.train``.
    """
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config = {config!r:.80}; give a kimi_core.Config")
    if reward is not None and not callable(reward):
        raise ValueError(
            f"reward = {reward!r:.80}; give a function, or its name in Config(reward=...)"
        )
    given = Given(_prompts_in(prompts), examples, reward)
    config = given.named_in(config or Config())
    folder = train_run(
        config, resume=resume, accept_changes=accept_changes, console=console, given=given
    )
    iterations, evaluations = read_metrics(folder / "metrics.jsonl")
    return Result(folder, iterations, evaluations)


def _prompts_in(found: Any) -> list[Any] | None:
    """Pairs become prompts, numbered from 0; what is neither is refused later, with its index."""
    if found is None:
        return None
    found = found() if callable(found) else found
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"prompts = {found!r:.80}; give a list of Prompt or (text, answer) pairs")
    return [
        Prompt(row, str(one[0]), str(one[1])) if _is_pair(one) else one
        for row, one in enumerate(found)
    ]


def _is_pair(one: Any) -> bool:
    return (
        isinstance(one, tuple | list)
        and len(one) == 2
        and isinstance(one[0], str)
        and isinstance(one[1], str | int | float)
    )
