"""A warm-up set of long chains of thought (section 2.2), by rejection sampling.

A model answers the training prompts under a request to plan, evaluate, reflect and explore
(``warmup.ask``). Of the answers that the reward function finds right and that ended by themselves,
those with the most of these behaviours are kept, then the longest. ``warmup.jsonl`` holds them
behind the prompt alone, as ``sft.data`` reads them, so that the model learns to think unasked.
``warmup.md`` has lengths, behaviours and examples. ``answers.jsonl`` is the record of all answers:
the same command goes on from it after a crash.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console

from kimi_core.config import Config
from kimi_core.evaluation.answers import Draw, Responder, answers_to, asked_by
from kimi_core.evaluation.record import Answer, Record
from kimi_core.prompts.load import load_prompts, split
from kimi_core.prompts.messages import chat_prompts, fields_of
from kimi_core.run.curation import quoted
from kimi_core.run.files import write_atomically
from kimi_core.types import Prompt

BEHAVIOURS = {
    "plan": r"\b(?:first(?:ly)?,|(?:my|the|a) plan|step by step|step 1|we (?:need|have|want) to|"
    r"let'?s (?:start|begin|break)|to (?:solve|find|answer) (?:this|the|for))",
    "evaluate": r"\b(?:check(?:s|ing)?|verif(?:y|ies|ied|ying)|makes sense|confirm(?:s|ed)?|"
    r"substitut(?:e|ing) back|plug(?:ging)? (?:it|this|back))\b|\?.*=",
    "reflect": r"\b(?:wait\b|hmm|mistake|i was wrong|that(?:'s| is) (?:wrong|not right)|actually,|"
    r"let me (?:re|look again|think again)|on second thought)",
    "explore": r"\b(?:alternative(?:ly)?|another (?:way|approach|method)|instead,|other approach|"
    r"what if|suppose instead|different (?:way|approach|method)|case 1)",
}
"""Behaviour → words that show it, in any case. `?…=` is the check of our own tasks."""

_RULES = {name: re.compile(words, re.I) for name, words in BEHAVIOURS.items()}

SHOWN = 3
"""Examples in the report."""

Kept = tuple[Prompt, Answer]


def behaviours_of(text: str) -> list[str]:
    """Which of the four behaviours a chain of thought shows.

    >>> behaviours_of("First, I add. Wait, that is wrong. Let me check it another way.")
    ['plan', 'evaluate', 'reflect', 'explore']
    >>> behaviours_of("42")
    []
    """
    return [name for name, rule in _RULES.items() if rule.search(text)]


def warm_up(config: Config, *, console: Console | None = None) -> Path:
    """Make ``runs/NAME/warmup.jsonl`` of the training prompts and return its path.

    Raises:
        ValueError: a setting or a file cannot work, or no right answer is long enough.
        RewardError, RewardOutage, EngineFailed, OSError: what was judged before is kept, and the
            same call goes on.
    """
    console = console or Console()
    settings, most = config.warmup, config.rollout.max_response_tokens
    folder = Path(config.runs) / config.name
    bare = config.prompts.model_copy(update={"chat": False, "system": ""})
    prompts, _ = split(load_prompts(bare), bare.held_out, bare.split_seed)
    asked = [asked_by(settings.ask, one) for one in chat_prompts(prompts, config.prompts)]
    draw = Draw("warm up", settings.samples, most, settings.temperature)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        closing(Record(folder / "answers.jsonl")) as record,
        closing(Responder(config)) as responder,
    ):
        rows = [row for row, prompt in enumerate(asked) if responder.fits(prompt, most)]
        if not rows:
            raise ValueError(
                "No prompt fits into the model's context with rollout.max_response_tokens = "
                f"{most}: lower it"
            )
        some = [asked[row] for row in rows]
        answers = answers_to(some, draw, responder, record, console)
    found = list(zip([prompts[row] for row in rows], answers, strict=True))
    kept = [pair for prompt, answers in found for pair in _chosen(prompt, answers, config)]
    page = _page(found, kept, len(asked) - len(rows), config)
    write_atomically(folder / "warmup.md", page)
    if not kept:
        raise ValueError(_why_empty(found, folder, config))
    write_atomically(folder / "warmup.jsonl", "".join(map(_line, kept)))
    console.print(page.splitlines()[2], highlight=False, soft_wrap=True)
    return folder / "warmup.jsonl"


def _chosen(prompt: Prompt, answers: Sequence[Answer], config: Config) -> list[Kept]:
    """The right answers of a prompt that are kept; of those with the same text, one."""
    whole = {one.text: one for one in answers if _is_whole(one)}
    some = [one for one in whole.values() if one.tokens >= config.warmup.least_tokens]
    some.sort(key=lambda one: (len(behaviours_of(one.text)), one.tokens), reverse=True)
    return [(prompt, one) for one in some[: config.warmup.keep]]


def _is_whole(answer: Answer) -> bool:
    """Whether an answer is right, not empty, and ended by itself."""
    return answer.is_right and answer.end == "stop" and bool(answer.text)


def _line(kept: Kept) -> str:
    prompt, answer = kept
    facts = {"tokens": answer.tokens, "behaviours": behaviours_of(answer.text)}
    return json.dumps({**fields_of(prompt), "response": answer.text, **facts}) + "\n"


def _page(
    found: Sequence[tuple[Prompt, Sequence[Answer]]],
    kept: Sequence[Kept],
    too_long: int,
    config: Config,
) -> str:
    everything = [one for _, answers in found for one in answers]
    right = [one for one in everything if one.is_right]
    solved = sum(any(one.is_right for one in answers) for _, answers in found)
    lines = [
        f"# Warm-up set of {config.prompts.source}",
        "",
        f"{len(kept)} examples from {len(found)} prompts; {solved} prompts have a right answer, "
        f"{len(right)} of {len(everything)} answers are right; {too_long} prompts are too long.",
        "",
        "| | answers | tokens: mean | 10 % | median | 90 % | " + " | ".join(BEHAVIOURS) + " |",
        "|---" * (6 + len(BEHAVIOURS)) + "|",
        *(
            _row(name, some)
            for name, some in (
                ("all", everything),
                ("right", right),
                ("kept", [answer for _, answer in kept]),
            )
        ),
        "",
        f"Asked by: `{config.warmup.ask!r}`. Behaviours are counted by words, as",
        "`kimi_core/run/warmup.py` lists them; a column has the number of answers that show one.",
    ]
    for prompt, answer in kept[:SHOWN]:
        shown = ", ".join(behaviours_of(answer.text)) or "none"
        lines += ["", f"Prompt {prompt.id}; behaviours: {shown}.", *quoted(prompt.text)]
        lines += ["", "The response:", *quoted(answer.text)]
    return "\n".join(lines) + "\n"


def _row(name: str, answers: Sequence[Answer]) -> str:
    def cells() -> Iterator[str]:
        yield str(len(answers))
        if answers:
            tokens = [one.tokens for one in answers]
            yield f"{np.mean(tokens):.1f}"
            yield from (f"{one:.0f}" for one in np.percentile(tokens, [10, 50, 90]))
        else:
            yield from "––––"
        counts = Counter(shown for one in answers for shown in behaviours_of(one.text))
        yield from (str(counts[shown]) for shown in BEHAVIOURS)

    return f"| {name} | " + " | ".join(cells()) + " |"


def _why_empty(
    found: Sequence[tuple[Prompt, Sequence[Answer]]], folder: Path, config: Config
) -> str:
    right = [one for _, answers in found for one in answers if one.is_right]
    if not right:
        said = "no answer of the model is right. Give another model, easier prompts or more samples"
    elif not any(map(_is_whole, right)):
        said = "every right answer is empty or was cut; raise rollout.max_response_tokens"
    else:
        longest = max(one.tokens for one in right if _is_whole(one))
        said = (
            f"the longest right answer has {longest} tokens, and warmup.least_tokens = "
            f"{config.warmup.least_tokens}: lower it"
        )
    return f"There is no example: {said}. {folder / 'answers.jsonl'} keeps the answers"
