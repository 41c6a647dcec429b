"""The long2short methods of section 2.4, all from one trained run, and how they compare.

::

    runs/think/long2short/
      config.toml     the run's settings, with those of [long2short]
      summary.json    a point for each method and seed
      figure7.png     accuracy against mean tokens
      start/          a run folder whose checkpoint is the model that the run's RL started from
      seed-0/         answers.jsonl, the models merge/, shortest/ and dpo/, and the run folder rl/

A point that summary.json has is not made a second time. Sampling and RL go on where a crash
interrupted them; merging, SFT and DPO start again.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kimi_core.config import Config
from kimi_core.evaluation.answers import Draw, Responder
from kimi_core.evaluation.record import Answer, Record, key_of
from kimi_core.long2short.comparison import Point, draw, table
from kimi_core.long2short.merge import merge
from kimi_core.long2short.pairs import preference_pairs, shortest_right
from kimi_core.metrics import read_metrics
from kimi_core.models.codec import Codec
from kimi_core.prompts.load import load_prompts, split
from kimi_core.run.build import model_to_train
from kimi_core.run.config_file import dump_toml, load_config
from kimi_core.run.files import discard, put_in_place, read_object, write_atomically
from kimi_core.run.folder import flatten, holds_state
from kimi_core.run.launch import start_ranks
from kimi_core.run.lock import take_lock
from kimi_core.run.run import evaluate_alone, fine_tune_alone, train
from kimi_core.run.stop import Stopped
from kimi_core.trainer.dpo import DpoPhase, Pair
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.sft import SftPhase
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Prompt
from kimi_core.weights.publish import InPlace

FITTING = 0.95
"""Share of the shortest right answers that fit into RL's maximum length, unless it is set."""


def long2short(
    run: Path,
    config: Config,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = (),
    out: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Make a shorter model by each method and for each seed; return the folder of the summary.

    Args:
        run: the folder of a run that has ended.
        config: the run's settings, with those of ``[long2short]``.
        methods: some of ``long2short.METHODS``.
        seeds: each decides sampling, training and evaluation; none: the run's seed.
        out: the folder to write to; None: ``long2short`` in the run's folder.

    Raises:
        ValueError: the run has no checkpoint, ``out`` holds points with other settings, the models
            cannot be merged, or the sampled answers teach nothing. Points made before are kept.
        RewardError, RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, OSError: as
            ``run.train`` raises them.
    """
    console = console or Console()
    long = run / "checkpoint"
    if not (long / "config.json").is_file():
        raise ValueError(
            f"{run} has no checkpoint, because the run has not ended: finish it with "
            "`kimi train --resume`, or name another run"
        )
    out = out or run / "long2short"
    out.mkdir(parents=True, exist_ok=True)
    lock = take_lock(out)
    try:
        points = _points_in(out, config)
        for seed in seeds or (config.seed,):
            work = _Work(config, long, seed, out, console)
            for method in ("long", *methods):
                if not any((one.method, one.seed) == (method, seed) for one in points):
                    points.append(_point(work, method))
                    record = {"run": str(run), "points": [asdict(one) for one in points]}
                    write_atomically(out / "summary.json", json.dumps(record, indent=1))
                    write_atomically(out / "figure7.png", draw(points))
    except Stopped as stopped:
        stopped.way_on = "the same command goes on"  # It has no --resume.
        raise
    finally:
        os.close(lock)
    console.print(table(points), highlight=False, soft_wrap=True)
    return out


@dataclass(frozen=True)
class _Made:
    """A model, and what it took to make it."""

    model: Path
    samples: int = 0
    cpu_s: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class _Drawn:
    """Prompts with the long model's answers to each."""

    prompts: list[Prompt]
    answers: list[list[Answer]]
    cpu_s: float

    @property
    def samples(self) -> int:
        return sum(map(len, self.answers))


@dataclass
class _Work:
    """What the methods start from, for one seed."""

    given: Config
    """The run's settings."""
    long: Path
    """The model that is to become shorter."""
    seed: int
    out: Path
    console: Console

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    def config(self, model: Path, **changes: Any) -> Config:
        """The run's settings for another model, without SFT and with this seed."""
        given = self.given
        changes["model"] = given.model.model_copy(update={"name": str(model)})
        changes["sft"] = given.sft.model_copy(update={"data": "none"})
        return given.model_copy(update={"seed": self.seed, **changes})

    def say(self, what: str) -> None:
        self.console.print(what, highlight=False, soft_wrap=True)

    @cached_property
    def drawn(self) -> _Drawn:
        """The answers that ``shortest`` and ``dpo`` learn from.

        Raises:
            ValueError: none of them is right.
        """
        config, settings = self.config(self.long), self.given.long2short
        everything = load_prompts(config.prompts)
        some, _ = split(everything, config.prompts.held_out, config.prompts.split_seed)
        rows = random.Random(self.seed).sample(range(len(some)), min(settings.prompts, len(some)))
        prompts = [some[row] for row in rows]
        size, temperature = config.rollout.max_response_tokens, config.rollout.temperature
        plan = Draw("long2short", settings.samples, size, temperature)
        self.say(f"sampling {settings.samples} answers to each of {len(prompts)} prompts")
        started = _cpu_s()
        with closing(Record(self.folder / "answers.jsonl")) as record:
            with closing(Responder(config)) as responder:
                responder.draw(plan, prompts, record)
            answers = [record.answers(plan.name, key_of(prompt)) for prompt in prompts]
        took = self.folder / "answers_cpu_s.json"
        if not took.exists():
            write_atomically(took, json.dumps(_cpu_s() - started))
        found = _Drawn(prompts, answers, json.loads(took.read_text()))
        if not any(shortest_right(one) for one in answers):
            raise ValueError(
                f"None of the {found.samples} answers to {len(prompts)} training prompts is right, "
                "so they teach nothing: raise long2short.prompts or long2short.samples, or train "
                "the run further"
            )
        return found


def _point(work: _Work, method: str) -> Point:
    """Make a model by a method and evaluate it as the long one is."""
    work.folder.mkdir(exist_ok=True)
    work.say(f"seed {work.seed}: {method}")
    ways = {"merge": _merge, "shortest": _shortest, "dpo": _dpo, "rl": _rl}
    try:
        made = _Made(work.long) if method == "long" else ways[method](work)
    except ValueError as error:
        raise ValueError(
            f"long2short by {method}: {error}\nThe points in {work.out / 'summary.json'} are kept; "
            "--methods names the others, to go on without this one"
        ) from error
    found = evaluate_alone(work.config(made.model))
    return Point(
        method=method,
        seed=work.seed,
        accuracy_greedy=found.accuracy_greedy,
        accuracy_sampled=found.accuracy_sampled,
        tokens=found.length_mean,
        n=found.n,
        samples=made.samples,
        cpu_s=made.cpu_s,
        note=made.note,
    )


def _merge(work: _Work) -> _Made:
    settings = work.given.long2short
    others = [Path(name) for name in settings.short] or [_start(work)]
    started = _cpu_s()
    with _replacing(work.folder / "merge") as partial:
        merge([work.long, *others], partial, settings.weights)
    return _Made(
        work.folder / "merge", cpu_s=_cpu_s() - started, note=f"with {', '.join(map(str, others))}"
    )


def _start(work: _Work) -> Path:
    """The model that the run's RL started from: its SFT is repeated, once for all seeds."""
    folder = work.out / "start"
    if not (folder / "checkpoint").is_dir():
        if not holds_state(folder):  # It may hold the start of an evaluation.
            discard(folder)
        work.say("making the model that RL started from, to merge with")
        config = work.given.model_copy(update={"name": folder.name, "runs": str(work.out)})
        fine_tune_alone(config, resume=True)
    return folder / "checkpoint"


def _shortest(work: _Work) -> _Made:
    drawn, settings = work.drawn, work.given.long2short.sft
    found = [
        (p, shortest_right(some)) for p, some in zip(drawn.prompts, drawn.answers, strict=True)
    ]
    best = [(prompt, answer) for prompt, answer in found if answer]

    def fit(trainer: Trainer, codec: Codec) -> None:
        examples = [_encoded(codec, prompt, answer) for prompt, answer in best]
        report = _report(work, "shortest", settings.steps)
        phase = SftPhase(trainer, settings, work.given.trainer, report, key="long2short.sft")
        phase.fit(examples, work.seed)

    return _fitted(work, "shortest", fit, f"the shortest right answers to {len(best)} prompts")


def _dpo(work: _Work) -> _Made:
    drawn, settings = work.drawn, work.given.long2short.dpo
    both = zip(drawn.prompts, drawn.answers, strict=True)
    pairs = [(prompt, *pair) for prompt, some in both for pair in preference_pairs(some)]
    if not pairs:
        raise ValueError(
            "the sampled answers give no pair: no wrong one is longer than the shortest right one "
            "to its prompt, and no right one is 1.5 times as long. Raise long2short.samples"
        )

    def fit(trainer: Trainer, codec: Codec) -> None:
        def encoded(prompt: Prompt, chosen: Answer, rejected: Answer) -> Pair:
            return *_encoded(codec, prompt, chosen), _encoded(codec, prompt, rejected)[1]

        phase = DpoPhase(trainer, work.given.trainer, _report(work, "dpo", settings.steps))
        phase.fit([encoded(*pair) for pair in pairs], settings, work.seed, "long2short.dpo")

    wrong = sum(not shortest_right([rejected]) for _, _, rejected in pairs)
    note = f"{len(pairs)} pairs, in {wrong} of which the rejected answer is wrong"
    return _fitted(work, "dpo", fit, note)


def _fitted(work: _Work, name: str, fit: Callable[[Trainer, Codec], None], note: str) -> _Made:
    """Train the long model on the sampled answers by ``fit``, and save it as ``name``."""
    config = work.config(work.long)
    started = _cpu_s()
    model, tokenizer = model_to_train(config, None)
    policy = Policy(model, temperature=1.0, head_chunk=config.trainer.head_chunk)
    ranks = start_ranks(config, policy)
    try:
        trainer = Trainer(policy, config.trainer, InPlace(), ranks)
        fit(trainer, Codec(tokenizer, config.rollout.stop, model))
        spent = work.drawn.cpu_s + _cpu_s() - started
        with _replacing(work.folder / name) as partial:
            trainer.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    finally:
        ranks.close()
    return _Made(work.folder / name, work.drawn.samples, spent, note)


def _rl(work: _Work) -> _Made:
    given, settings = work.given, work.given.long2short.rl
    limit, samples, cpu_s = settings.max_response_tokens, 0, 0.0
    if limit is None:
        shortest = [best.tokens for some in work.drawn.answers if (best := shortest_right(some))]
        limit = int(np.quantile(shortest, FITTING, method="higher"))
        samples, cpu_s = work.drawn.samples, work.drawn.cpu_s
    limit = min(limit, given.rollout.max_response_tokens)
    length = {"length_weight": settings.length_weight, "length_warmup": 0}
    config = work.config(
        work.long,
        name="rl",
        runs=str(work.folder),
        iterations=settings.iterations,
        samples=None,
        rollout=given.rollout.model_copy(update={"max_response_tokens": limit}),
        reward=given.reward.model_copy(update=length),
        evaluation=given.evaluation.model_copy(update={"every": settings.iterations}),
    )
    folder = train(config, resume=True, console=work.console)
    iterations, _ = read_metrics(folder / "metrics.jsonl")
    return _Made(
        folder / "checkpoint",
        samples + iterations[-1].samples_trained_total,
        cpu_s + sum(one.cpu_s for one in iterations),
        f"{settings.iterations} iterations, at most {limit} tokens a response",
    )


def _points_in(out: Path, config: Config) -> list[Point]:
    """The points made before; the settings are written down if there are none yet.

    Raises:
        ValueError: ``out`` was begun with other settings, or its summary is damaged.
    """
    path = out / "config.toml"
    if not path.exists():
        write_atomically(path, dump_toml(config))
    before, now = flatten(load_config(path)), flatten(config)
    unlike = [key for key in before if before[key] != now[key] and key != "seed"]
    if unlike:
        raise ValueError(
            f"{out} was begun with other settings: "
            + ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in unlike)
            + ". Put them back, or name another folder with --out"
        )
    summary = out / "summary.json"
    if not summary.exists():
        return []
    way_out = f"remove {summary.name}; its points are measured again"
    found = read_object(summary, way_out)
    try:
        return [Point(**one) for one in found["points"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{summary} is damaged ({error!r}): {way_out}") from None


def _encoded(codec: Codec, prompt: Prompt, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a prompt and of an answer; with an end token if the answer ended itself."""
    ids, response = codec.encode_example(prompt.messages or prompt.text, answer.text)
    return ids, response if answer.end == "stop" else response[:-1]


def _report(work: _Work, name: str, steps: int) -> Callable[[int, float], None]:
    every = max(1, steps // 5)

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            work.say(f"{name} {step}/{steps}  loss {loss:.3f}")

    return report


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``final`` at the end."""
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    put_in_place(partial, final)


def _cpu_s() -> float:
    """CPU-seconds of this process and of the processes that it waited for."""
    return sum(os.times()[:4])
