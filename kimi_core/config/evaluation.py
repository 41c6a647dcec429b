"""Settings of what a run measures and records: evaluations, and files of trajectories."""

import re

from pydantic import Field, model_validator

from kimi_core.config.section import Section

HELD_OUT = "held_out"
"""The name of the held-out prompts among the evaluation sets."""

METRICS = {"greedy": "accuracy_greedy", "sampled": "accuracy_sampled"}
"""What `evaluation.best` may compare, besides pass@k → the key of an evaluation line."""


def pass_ks(samples: int) -> list[int]:
    """The k of which pass@k is reported: the powers of 2 up to ``samples``, and ``samples``.

    >>> pass_ks(1), pass_ks(6)
    ([1], [1, 2, 4, 6])
    """
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


class EvaluationSetConfig(Section):
    source: str
    """As `prompts.source`; or a benchmark and its file, as `gsm8k:test.jsonl` (docs/evaluation.md),
    whose problems are asked and judged as `kimi evaluate --benchmark` does."""
    fields: dict[str, str] = {}
    """As `prompts.fields`."""
    template: str = ""
    """As `prompts.template`."""
    split: str = "test"
    """As `prompts.split`."""
    prompts: int | None = Field(None, ge=1)
    """The first prompts of the set that are used, in every evaluation. Unset: all."""
    samples: int = Field(1, ge=1)
    """As `evaluation.samples`."""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Iterations between evaluations. A run also evaluates at its start and at its end."""
    prompts: int | None = Field(None, ge=1)
    """Held-out prompts of the evaluations in between; the first and the last use all. Unset:
    all."""
    samples: int = Field(1, ge=1)
    """Sampled answers to each held-out prompt, besides the most likely one. With 2 or more, pass@k
    is reported."""
    best: str = ""
    """Keep the best checkpoint in `runs/NAME/best`: the set and the accuracy that decide, as
    `held_out/greedy`, `held_out/sampled` or `gsm8k/pass@4`. Empty: the last one alone is kept."""
    patience: int | None = Field(None, ge=1)
    """End the run after this many evaluations in a row without a better one than before, by `best`.
    Unset: never."""
    sets: dict[str, EvaluationSetConfig] = {}
    """Other sets of prompts that are evaluated, too, each with a name: a section
    `[evaluation.sets.NAME]`."""

    @model_validator(mode="after")
    def _sets_have_names(self) -> "EvaluationConfig":
        for name in self.sets:
            if name == HELD_OUT or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"evaluation.sets.{name}: a set's name has letters, digits, _ and -, and is "
                    f"not {HELD_OUT}"
                )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "EvaluationConfig":
        if not self.best:
            if self.patience is not None:
                raise ValueError(
                    f"evaluation.patience = {self.patience} without evaluation.best: say what "
                    "counts as better, as evaluation.best=held_out/greedy"
                )
            return self
        allowed = [
            f"{name}/{metric}"
            for name, samples in self.samples_of().items()
            for metric in [*METRICS, *(f"pass@{k}" for k in pass_ks(samples) if samples > 1)]
        ]
        if self.best not in allowed:
            raise ValueError(
                f"evaluation.best = {self.best!r}; these settings measure {', '.join(allowed)}"
            )
        return self

    def samples_of(self) -> dict[str, int]:
        """Name of each set → samples; the held-out prompts come first."""
        return {HELD_OUT: self.samples} | {name: one.samples for name, one in self.sets.items()}


class TrajectoriesConfig(Section):
    every: int = Field(1, ge=0)
    """Iterations between two files in `trajectories/`; 1 writes one per iteration, 0 none."""
    tokens: bool = True
    """Write token ids and log-probs. Off: texts and rewards only, a sixth of the size or less."""
