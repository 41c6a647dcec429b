"""Evaluation on a benchmark: k answers to each problem, and a file with all that repeats it."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kimi_core import __version__
from kimi_core.config import Config
from kimi_core.config.evaluation import pass_ks
from kimi_core.evaluation.answers import Draw, Responder, answers_to
from kimi_core.evaluation.benchmarks import (
    ASK,
    BENCHMARKS,
    Kind,
    chosen,
    files_of,
    load_benchmark,
    reward_of,
)
from kimi_core.evaluation.record import Answer, Record
from kimi_core.evaluation.statistics import interval, majority, pass_at_k
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.math.answers import agree, clean
from kimi_core.reward.math.extract import extract
from kimi_core.run.config_file import dump_toml
from kimi_core.run.files import write_atomically
from kimi_core.types import Prompt

Judged = tuple[Prompt, list[Answer]]


def run_benchmark(
    config: Config,
    name: str,
    data: Path | None,
    *,
    samples: int = 1,
    limit: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer the first ``limit`` problems and return the figures, which are also written.

    One sample is the most likely answer; more are drawn at ``rollout.temperature``. Everything goes
    to ``runs/NAME/BENCHMARK``: ``answers.jsonl``, from which the same call goes on after a crash,
    and ``results.json``.

    Raises:
        ValueError: a setting or a file cannot work, or a problem does not fit into the context.
        RewardOutage, EngineFailed, OSError: what was judged before is kept.
    """
    if samples < 1 or (limit is not None and limit < 1):
        raise ValueError(f"--samples = {samples}, --limit = {limit}; allowed are 1 or more")
    files = files_of(name, data)
    prompts = load_benchmark(name, files)[:limit]
    asked = chat_prompts(prompts, config.prompts)
    most, kind = config.rollout.max_response_tokens, BENCHMARKS[name][0]
    temperature = config.rollout.temperature if samples > 1 else 0.0
    folder = Path(config.runs) / config.name / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = Draw(name, samples, most, temperature)
    with (
        closing(Record(folder / "answers.jsonl")) as record,
        closing(Responder(config, reward=reward_of(name, config.reward))) as responder,
    ):
        for prompt in asked:
            if not responder.fits(prompt, most):
                raise ValueError(
                    f"Problem {prompt.id} does not fit into the model's context with "
                    f"rollout.max_response_tokens = {most}: lower it"
                )
        answers = answers_to(asked, draw, responder, record, console or Console(stderr=True))
        weights = responder.weights
    results = {
        "benchmark": name,
        "data": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "asked": ASK[kind],
        "samples": samples,
        "temperature": temperature,
        **figures(list(zip(asked, answers, strict=True)), kind, samples, config.seed),
        "model": config.model.name,
        "weights_crc32c": weights,
        "kimi_core": __version__,
        "config": dump_toml(config),
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def figures(judged: Sequence[Judged], kind: Kind, samples: int, seed: int) -> dict[str, Any]:
    """Accuracy, pass@k, maj@k and lengths. Answers without a verdict are counted and left out."""
    scored = [(prompt, [one for one in some if one.reward is not None]) for prompt, some in judged]
    scored = [(prompt, some) for prompt, some in scored if some]
    everything = [one for _, some in judged for one in some]
    shares = [sum(one.is_right for one in some) / len(some) for _, some in scored]
    found: dict[str, Any] = {
        "problems": len(judged),
        "unscored": sum(one.reward is None for one in everything),
        f"avg@{samples}": _mean(shares, seed),
        "pass@k": {},
    }
    for k in pass_ks(samples):
        chances = [
            pass_at_k(len(some), sum(one.is_right for one in some), k)
            for _, some in scored
            if len(some) >= k
        ]
        found["pass@k"][str(k)] = _mean(chances, seed)
    if kind != "code" and samples > 1:
        found[f"maj@{samples}"] = _mean(
            [_majority(some, prompt.tags.get("judged", kind)) for prompt, some in scored], seed
        )
    subjects: dict[str, list[float]] = defaultdict(list)
    for (prompt, _), share in zip(scored, shares, strict=True):
        subjects[prompt.tags.get("subject", "")].append(share)
    if len(subjects) > 1:
        found["by_subject"] = {
            subject: {"problems": len(some), "accuracy": float(np.mean(some))}
            for subject, some in sorted(subjects.items())
        }
    found["tokens_mean"] = float(np.mean([one.tokens for one in everything]))
    found["cut"] = sum(one.end == "length" for one in everything) / len(everything)
    return found


def _mean(values: Sequence[float], seed: int) -> dict[str, Any] | None:
    """The mean over problems with its 95 % interval; None if there is no problem."""
    if not values:
        return None
    low, high, method = interval(values, seed)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "interval": method}


def _majority(answers: Sequence[Answer], kind: str) -> float:
    """1 if the most frequent final answer is right. Answers without a final one have no vote."""
    if kind == "choice":
        said = [chosen(one.text) for one in answers]
    else:
        texts = [extract(one.text, ["boxed", "hashes", "answer", "last_line"]) for one in answers]
        said = [None if text is None else clean(text) for text in texts]
    index = majority(said, lambda one, other: one == other or agree(one, other) is True)
    return float(index is not None and answers[index].is_right)
