"""The two records of a run, how ``metrics.jsonl`` is read, and the summary of both.

``docs/metrics.md`` describes the files. A number that was not measured, or is not finite, is NaN
here and ``null`` in the files.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kimi_core.config.evaluation import HELD_OUT, METRICS

TIMES = ("wall_s", "cpu_s", "rollout_s", "train_s", "tokens_per_s", "turn_s")
"""Numbers of a record that a clock measures; all others come again with the same bits."""


PROCESSES = ("worker_restarts", "worker_tokens")
"""Numbers of a record that tell what its processes went through."""


@dataclass(frozen=True, kw_only=True)
class IterationMetrics:
    """One RL iteration: a rollout phase, then a training phase."""

    iteration: int
    """Number of the iteration, starting at 1."""
    policy_version: int
    """Version of the weights that sampled in this iteration."""
    wall_s: float
    """Seconds of wall-clock time from start to end, without evaluation."""
    cpu_s: float
    """Seconds of CPU time of the process, all threads."""
    rollout_s: float
    """Seconds of wall-clock time in the rollout phase."""
    train_s: float
    """Seconds of wall-clock time in the training phase."""
    reward_mean: float
    """Mean reward of the responses trained, with length reward and penalties."""
    accuracy_sampled: float
    """Mean correctness of the responses trained, as sampled in training, in [0, 1]."""
    length_mean: float
    """Mean length of the responses trained, tokens."""
    tokens_sampled: int
    """Output tokens sampled."""
    tokens_per_s: float
    """Output tokens sampled per second of the rollout phase."""
    decode_steps: int
    """Decode steps of the engine; a step adds one token to every trajectory in a batch."""
    trajectories_finished: int
    """Responses that ended."""
    trajectories_unfinished: int
    """Responses that spent their budget and wait in the buffer for the next iteration."""
    repeat_stops: int
    """Responses that were stopped for repeating themselves."""
    samples_trained: int
    """Responses trained."""
    samples_trained_total: int
    """Responses trained since the start of RL."""
    tokens_stale_share: float
    """Share of the trained tokens that an older version sampled, in [0, 1]."""
    max_staleness: int
    """Age of the oldest token trained, in versions."""
    logprob_gap_mean: float
    """Mean |Δ log-prob| between engine and trainer on tokens of this iteration, nats."""
    logprob_gap_max: float
    """Largest |Δ log-prob| between engine and trainer on tokens of this iteration, nats."""
    reference_recomputed: bool
    """Whether the gap exceeded its limit, so that the trainer recomputed the reference."""
    loss: float
    """Mean loss per response over the updates. Watch it for jumps, not for progress."""
    grad_norm: float
    """Mean norm of the gradient over the updates, before clipping."""
    entropy: float = math.nan
    """Mean −log-prob of the sampled tokens, nats: an estimate of the policy's entropy per token."""
    zero_advantage_share: float = math.nan
    """Share of the trained responses whose advantage is 0: they teach nothing, in [0, 1]."""
    infrastructure_errors: int = 0
    """Responses without a verdict: neither trained nor counted as wrong."""
    logprob_gap_over_limit_share: float = math.nan
    """Share of this iteration's tokens whose |Δ log-prob| exceeds the limit, in [0, 1]."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Mean over the trained responses of each part that the reward functions report."""
    worker_restarts: int = 0
    """Processes of the engine that were lost and started a second time."""
    worker_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that each of several rollout workers sampled, by its number."""
    turn_s: dict[str, float] = field(default_factory=dict)
    """Seconds of ``wake`` and ``sleep`` of the engine, ``publish`` and ``rest`` of the trainer,
    ``serve``, and ``save``. The save and the evaluation before the iteration are in them."""
    learning_rate: float = math.nan
    """Learning rate of the updates."""


@dataclass(frozen=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation on held-out prompts."""

    iteration: int
    """RL iterations done before it; 0 is the policy that RL starts from, after SFT."""
    policy_version: int
    """Version of the weights evaluated."""
    accuracy_greedy: float
    """Mean correctness of one response per prompt, the most likely token each time, in [0, 1]."""
    accuracy_sampled: float
    """Mean correctness of one response per prompt, sampled as in training, in [0, 1]."""
    length_mean: float
    """Mean length of the sampled responses, tokens."""
    n: int
    """Number of held-out prompts."""
    seed: int
    """Seed of the sampled responses."""
    wall_s: float = math.nan
    """Seconds of wall-clock time."""
    infrastructure_errors: int = 0
    """Responses, greedy and sampled, without a verdict; they are in neither accuracy."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Mean over the sampled responses of each part that the reward functions report."""
    greedy_by_domain: dict[str, float] = field(default_factory=dict)
    """As ``accuracy_greedy``, of the prompts with each ``domain`` tag."""
    sampled_by_domain: dict[str, float] = field(default_factory=dict)
    """As ``accuracy_sampled``, of the prompts with each ``domain`` tag."""
    same_answer: float = math.nan
    """Share of the questions asked as text and as an image whose greedy answers are the same, in
    [0, 1]; NaN if none is asked both ways."""
    samples: int = 1
    """Sampled responses to each prompt."""
    pass_at_k: dict[str, float] = field(default_factory=dict)
    """k → chance that one of k sampled responses is right, unbiased; empty with one sample."""
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of each other evaluation set → its numbers, by these same names."""

    def value(self, best: str) -> float:
        """The accuracy that a value of ``evaluation.best`` names; NaN: it was not measured."""
        return accuracy_in(vars(self), best)

    def as_set(self) -> dict[str, Any]:
        """What ``sets`` holds of an evaluation: its numbers, without those that are empty."""
        left_out = ("iteration", "policy_version", "seed", "sets")
        return {k: v for k, v in vars(self).items() if k not in left_out and v != {} and v == v}


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A setting that a resumed run has changed."""

    iteration: int
    """Iterations done with the setting as it was before."""
    setting: str
    before: Any
    now: Any


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A run goes on from a state."""

    iteration: int
    """Iterations done in that state."""
    lost_s: float
    """Seconds of iterations and evaluations after that state, which run a second time."""
    back_from: int | None = None
    """The newest state before ``--from`` went back to this one; None: it was the newest."""


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A number of the run has fallen off a cliff, or jumped."""

    iteration: int
    """Iterations done when it was noticed."""
    rule: str
    """``accuracy``, ``entropy``, ``gradient norm`` or ``held-out accuracy``."""
    before: float
    """What it was: a mean or median of the iterations before, or the best evaluation."""
    now: float
    good_state: int | None = None
    """The state to go back to; None: none is there."""


KINDS: dict[str, type] = {
    "iteration": IterationMetrics,
    "evaluation": EvaluationMetrics,
    "change": SettingChange,
    "resume": Resumption,
    "collapse": Collapse,
}
"""``kind`` of a line of ``metrics.jsonl`` → what the line holds."""


def accuracy_in(evaluation: Mapping[str, Any], best: str) -> float:
    """The accuracy that a value of ``evaluation.best`` names; NaN: it was not measured.

    >>> accuracy_in({"sets": {"gsm8k": {"pass_at_k": {"4": 0.5}}}}, "gsm8k/pass@4")
    0.5
    """
    name, _, metric = best.partition("/")
    numbers = evaluation if name == HELD_OUT else evaluation.get("sets", {}).get(name, {})
    if metric in METRICS:
        found = numbers.get(METRICS[metric])
    else:
        found = numbers.get("pass_at_k", {}).get(metric.removeprefix("pass@"))
    return math.nan if found is None else found


def is_stuck(values: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` values are all no better than one before them.

    What was not measured is worse than everything else.
    """
    values = [-math.inf if math.isnan(value) else value for value in values]
    return bool(values) and len(values) - 1 - values.index(max(values)) >= patience


def read_metrics(path: str | Path) -> tuple[list[IterationMetrics], list[EvaluationMetrics]]:
    """Read a ``metrics.jsonl`` in file order. Unknown keys are left out.

    The torn last line that a killed process leaves is skipped. A missing file counts as empty.

    Raises:
        ValueError: another line is not valid; the message names it.
    """
    iterations: list[IterationMetrics] = []
    evaluations: list[EvaluationMetrics] = []
    for _, record in read_lines(Path(path)):
        values = _with_nan(record)
        kind = values.pop("kind")
        if kind == "iteration":
            iterations.append(IterationMetrics(**_known(IterationMetrics, values)))
        elif kind == "evaluation":
            evaluations.append(EvaluationMetrics(**_known(EvaluationMetrics, values)))
    return iterations, evaluations


def summarize(
    iterations: Sequence[IterationMetrics],
    evaluations: Sequence[EvaluationMetrics],
    *,
    sft_s: float = 0.0,
    lost_s: float = 0.0,
) -> dict[str, Any]:
    """The content of ``summary.json``; an evaluation is None if there was none.

    Args:
        sft_s: seconds of SFT.
        lost_s: seconds of what ran a second time after a resume.
    """
    spans_s = [m.wall_s for m in iterations] + [e.wall_s for e in evaluations]
    return {
        "iterations": iterations[-1].iteration if iterations else 0,
        "wall_s": sft_s + lost_s + sum(span for span in spans_s if math.isfinite(span)),
        "tokens_sampled": sum(m.tokens_sampled for m in iterations),
        "samples_trained": sum(m.samples_trained for m in iterations),
        "infrastructure_errors": sum(m.infrastructure_errors for m in iterations),
        "first_evaluation": to_record(evaluations[0]) if evaluations else None,
        "last_evaluation": to_record(evaluations[-1]) if evaluations else None,
    }


def to_record(metrics: IterationMetrics | EvaluationMetrics) -> dict[str, Any]:
    """The metrics as JSON allows them: numbers that are not finite become None."""
    return _with_none(vars(metrics))


def _with_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same without numbers that are not finite, also in what it holds."""
    return {
        name: _with_none(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def _with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``_with_none``."""
    return {
        name: _with_nan(value) if isinstance(value, dict) else math.nan if value is None else value
        for name, value in values.items()
    }


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a record holds, with ``/`` between the names of what lies inside of another.

    >>> list(leaves({"n": 4, "sets": {"easy": {"pass_at_k": {"2": 0.5}}}}))
    [('n', 4), ('sets/easy/pass_at_k/2', 0.5)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def mean_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each part over the responses that have it."""
    names = dict.fromkeys(name for one in parts for name in one)
    found = {name: [one[name] for one in parts if name in one] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def plain(metrics: Any) -> Any:
    """The same metrics with Python numbers in place of numpy and torch scalars."""
    scalars = {k: v.item() for k, v in vars(metrics).items() if hasattr(v, "item")}
    return replace(metrics, **scalars)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line and its record.

    Raises:
        ValueError: a line is not JSON, has an unknown kind, lacks a key, or has a value of another
            type.
    """
    if not path.exists():
        return []
    # The part after the last line feed is torn or empty.
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("kind") not in [*KINDS]:
            raise ValueError(f"{path}, line {number}: its kind must be {' or '.join(KINDS)}")
        if wrong := _wrong_in(record):
            raise ValueError(f"{path}, line {number} {wrong}")
        records.append((line, record))
    return records


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _wrong_in(record: Mapping[str, Any]) -> str:
    """What is missing in a record, or the first value of another type, in words."""
    kind = KINDS[record["kind"]]
    may_be_none = {field.name for field in fields(kind) if field.default is None}
    values = {name: v for name, v in record.items() if not (v is None and name in may_be_none)}
    try:
        # As JSON, because there a mapping may stand for a dataclass while its values must be exact.
        _adapter(kind).validate_json(json.dumps(_with_nan(_known(kind, values))), strict=True)
    except ValidationError as error:
        faults = error.errors()
        if missing := sorted(str(one["loc"][0]) for one in faults if one["type"] == "missing"):
            return f"lacks {', '.join(missing)}"
        name = "/".join(map(str, faults[0]["loc"]))
        return f"has {name} = {faults[0]['input']!r:.50}: {faults[0]['msg']}"
    return ""
