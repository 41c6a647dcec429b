"""A training set from a file of prompts, with a report (section 2.1).

1. Rules on the texts drop multiple-choice, true/false and proof questions, prompts of evaluation
   sets, and near-duplicates.
2. A model guesses without a chain of thought. Prompts with a right guess are easy to hack.
3. The model answers. Difficulty is 1 − the share of right answers; trivial and hopeless prompts are
   dropped.
4. A discipline with too many prompts keeps some of each difficulty.

``curated.jsonl`` holds what is left, ``dropped.jsonl`` the rest with the reasons, ``report.md``
both in numbers and examples. ``answers.jsonl`` is the record of what the model said: the same
command goes on from it after a crash, and takes other thresholds without asking the model again.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from kimi_core.config import Config, CurateConfig
from kimi_core.evaluation.answers import Draw, Responder, answers_to, asked_by
from kimi_core.evaluation.benchmarks import questions_of
from kimi_core.evaluation.record import Answer, Record
from kimi_core.evaluation.sets import benchmark_in
from kimi_core.prompts.duplicates import Leaks, near_duplicates
from kimi_core.prompts.forms import form_of, subject_of
from kimi_core.prompts.load import load_prompts
from kimi_core.prompts.messages import chat_prompts, fields_of
from kimi_core.run.curation import Curation, page
from kimi_core.run.files import write_atomically
from kimi_core.types import Prompt


def curate(config: Config, *, console: Console | None = None) -> Path:
    """Make ``runs/NAME/curated.jsonl`` of the prompts of ``prompts.source``; return the folder.

    Raises:
        ValueError: a setting or a file cannot work, or no prompt is left; the report says why.
        RewardError, RewardOutage, EngineFailed, OSError: what was judged before is kept, and the
            same call goes on.
    """
    console = console or Console()
    folder = Path(config.runs) / config.name
    prompts = _read(config, config.prompts.source)
    curation = by_rules(prompts, config)
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Record(folder / "answers.jsonl")) as record:
        if curation.left():
            with closing(Responder(config)) as responder:
                _by_answers(curation, config, responder, record, console)
        _balance(curation, config.curate)
        _write(curation, config, folder)
    if not curation.left():
        raise ValueError(_why_empty(curation, folder))
    console.print(curation.summary(), highlight=False, soft_wrap=True)
    return folder


def _read(config: Config, source: str) -> list[Prompt]:
    """The prompts of a source as it has them, without a chat template."""
    plain = {"source": source, "chat": False, "system": ""}
    return list(load_prompts(config.prompts.model_copy(update=plain)))


def _held(config: Config, source: str) -> list[str]:
    """The questions of an evaluation set."""
    if found := benchmark_in(source):
        return questions_of(*found)
    return [one.text for one in _read(config, source)]


def by_rules(prompts: list[Prompt], config: Config) -> Curation:
    """The prompts with their subjects, and without those that the rules on texts drop."""
    settings = config.curate
    curation = Curation(prompts, [subject_of(one.text, one.tags) for one in prompts])
    for row, prompt in enumerate(prompts):
        if form := form_of(prompt.text, prompt.answer):
            curation.drop(row, form)
    held = [text for source in settings.evaluation_sets for text in _held(config, source)]
    leaks, rows = Leaks(held, settings.shared_words), curation.left()
    alike = near_duplicates([*held, *(prompts[row].text for row in rows)], settings.similarity)
    for row, other in zip(rows, alike[len(held) :], strict=True):
        leaked = leaks.inside(prompts[row].text)
        if other is not None and other < len(held):
            leaked = other
        if leaked is not None:
            curation.drop(row, "in an evaluation set", f"has: {held[leaked]}")
        elif other is not None:
            curation.drop(row, "near-duplicate", f"of: {prompts[rows[other - len(held)]].text}")
    return curation


def _by_answers(
    curation: Curation, config: Config, responder: Responder, record: Record, console: Console
) -> None:
    settings, most = config.curate, config.rollout.max_response_tokens
    posed = chat_prompts([curation.prompts[row] for row in curation.left()], config.prompts)
    asked = dict(zip(curation.left(), posed, strict=True))
    guesses = {row: asked_by(settings.guess_prompt, prompt) for row, prompt in asked.items()}
    for row, prompt in asked.items():
        fits = responder.fits(prompt, most)
        if not (fits and responder.fits(guesses[row], settings.guess_tokens)):
            curation.drop(row, "too long", "the model's context has no room for an answer")

    def answers(draw: Draw, posed: dict[int, Prompt]) -> Iterable[tuple[int, list[Answer]]]:
        rows = curation.left()
        found = answers_to([posed[row] for row in rows], draw, responder, record, console)
        return zip(rows, found, strict=True)

    if settings.guesses:
        draw = Draw("guess", settings.guesses, settings.guess_tokens, settings.temperature)
        for row, found in answers(draw, guesses):
            if right := [one for one in found if one.is_right]:
                said = f"{len(right)} of {len(found)} guesses are right: {right[0].text!r:.80}"
                curation.drop(row, "easy to hack", said)
    draw = Draw("solve", settings.samples, most, settings.temperature)
    for row, found in answers(draw, asked):
        _judge(curation, row, found, settings)


def _judge(curation: Curation, row: int, answers: list[Answer], settings: CurateConfig) -> None:
    judged = [one for one in answers if one.reward is not None]
    curation.shown[row] = next((one for one in answers if one.is_right), answers[0])
    if not judged:
        curation.drop(row, "no verdict", "the reward function could judge no answer")
        return
    wrong = len(judged) - sum(one.is_right for one in judged)
    difficulty = curation.difficulty[row] = wrong / len(judged)
    said = f"{len(judged) - wrong} of {len(judged)} answers are right"
    if difficulty < settings.lowest_difficulty:
        curation.drop(row, "trivial", said)
    elif difficulty > settings.highest_difficulty:
        curation.drop(row, "hopeless", said)


def _balance(curation: Curation, settings: CurateConfig) -> None:
    """Drop the surplus of each discipline, so that those that stay are spread over difficulty."""
    most = settings.most_per_discipline
    if most is None:
        return
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in sorted(curation.left(), key=lambda row: curation.difficulty[row]):
        rows[curation.subjects[row]].append(row)
    for subject, some in rows.items():
        if len(some) > most:
            stay = {some[place * len(some) // most] for place in range(most)}
            for row in set(some) - stay:
                curation.drop(row, "surplus", f"{subject[1]} has {len(some)} prompts")


def line_of(prompt: Prompt, **others: Any) -> str:
    """A prompt as a line of a JSONL file that ``prompts.source`` reads back."""
    return (
        json.dumps({**fields_of(prompt), "answer": prompt.answer, **prompt.tags, **others}) + "\n"
    )


def _write(curation: Curation, config: Config, folder: Path) -> None:
    kept: list[str] = []
    dropped: list[str] = []
    for row, (prompt, subject) in enumerate(zip(curation.prompts, curation.subjects, strict=True)):
        facts: dict[str, Any] = dict(zip(("domain", "discipline"), subject, strict=True))
        if row in curation.difficulty:
            facts["difficulty"] = curation.difficulty[row]
        if row in curation.dropped:
            reason, detail = curation.dropped[row]
            dropped.append(line_of(prompt, **facts, reason=reason, detail=detail))
        else:
            kept.append(line_of(prompt, **facts))
    write_atomically(folder / "dropped.jsonl", "".join(dropped))
    write_atomically(folder / "curated.jsonl", "".join(kept))
    write_atomically(folder / "report.md", page(curation, config))


def _why_empty(curation: Curation, folder: Path) -> str:
    said = f"No prompt is left: {curation.summary()}. "
    if curation.difficulty and all(one == 1 for one in curation.difficulty.values()):
        said += (
            "No answer of the model is right. Compare the answers in report.md with the "
            "references: does reward.function find the answer, and has the answer room in "
            "rollout.max_response_tokens? "
        )
    return f"{said}{folder / 'report.md'} has examples of each; the record of the answers is kept"
