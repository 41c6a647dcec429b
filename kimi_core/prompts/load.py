"""Loads prompts, and splits off those that are held out for evaluation."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_core.config import PromptsConfig
from kimi_core.plugins import load_function
from kimi_core.prompts.code_datasets import as_problem
from kimi_core.prompts.messages import chat_prompts, check_messages, question
from kimi_core.tasks import addition, humaneval, maximum, multiply, programs, retrieve
from kimi_core.types import Message, Prompt

TextExample = tuple[str | Sequence[Message], str]
"""A prompt, as text or as messages, and its response."""


def load_prompts(config: PromptsConfig, *, base_folder: str | Path = ".") -> list[Prompt]:
    """All prompts of ``config.source``, in a fixed order and with distinct ids.

    ``config.chat`` and ``config.system`` are applied.

    Args:
        base_folder: the folder that a relative file name in ``config.source`` starts from.

    Raises:
        ValueError: the source is unknown, a file is missing or malformed, or a function does not
            return a list of prompts with distinct ids.
    """
    return chat_prompts(_prompts_of(config, base_folder), config)


def _prompts_of(config: PromptsConfig, base_folder: str | Path) -> list[Prompt]:
    source = config.source
    if source == "multiply":
        return multiply.prompts()
    if source == "addition":
        # The split's seed, so that runs with different seeds are tested on the same prompts.
        return addition.prompts(config.task.shots, config.task.largest, config.split_seed)
    if source == "maximum":
        return maximum.prompts(config.task.shots, config.task.largest, config.split_seed)
    if source == "retrieve":
        task = config.task
        return retrieve.prompts(task.count, task.numbers, task.length, config.split_seed)
    if source == "programs":
        return programs.prompts()
    if source == "humaneval":
        return humaneval.prompts()
    if source.endswith(".jsonl"):
        return read_prompts(Path(base_folder) / source)
    if ".py:" in source:
        function = load_function(source, base_folder)
        try:
            found = function()
        except Exception as error:  # The user's code may raise anything.
            raise ValueError(f"{source} raised {type(error).__name__}: {error}") from error
        return _check_prompts(found, source)
    raise ValueError(
        f"prompts.source = {source!r}; allowed are multiply, addition, maximum, retrieve, "
        "programs, humaneval, a file that ends in .jsonl, or file.py:function"
    )


def split(prompts: Sequence[Prompt], held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (training prompts in the given order, held-out prompts in random order).

    So the first held-out prompts, which evaluations during a run use, are a fair sample. Prompts
    with the same ``problem`` tag (or, without the tag, the same text) stay on one side, so that no
    held-out question appears in training in another form. Whole problems are drawn at random as
    long as they fit into ``held_out`` prompts.

    Raises:
        ValueError: no prompt would be left to train on, or no problem is small enough to hold out.
    """
    problems: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        problems.setdefault(prompt.tags.get("problem", prompt.text), []).append(prompt)
    if held_out >= len(prompts):
        raise ValueError(
            f"Cannot hold out {held_out} of {len(prompts)} prompts: at least one must be left to "
            "train on; lower prompts.held_out"
        )
    order = list(problems)
    random.Random(seed).shuffle(order)
    test: list[Prompt] = []
    for problem in order:
        if len(test) + len(problems[problem]) <= held_out:
            test.extend(problems[problem])
    if not test:
        smallest = min(len(members) for members in problems.values())
        raise ValueError(
            f"Cannot hold out {held_out} prompts: each problem has at least {smallest}, which stay "
            "together; raise prompts.held_out"
        )
    chosen = {prompt.id for prompt in test}
    return [prompt for prompt in prompts if prompt.id not in chosen], test


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a JSONL file, numbered from 0: ``prompt`` and ``answer``, both strings.

    ``messages`` may stand in place of ``prompt``: a list of objects with ``role`` and ``content``.
    ``difficulty`` is optional, and so is ``answer`` where there are ``tests``; other keys become
    tags, as text. Lines of published datasets of programs are read as they are, see
    ``code_datasets``.

    Raises:
        ValueError: the file is missing or empty, or a line is bad; the message says what was found.
    """
    prompts: list[Prompt] = []
    for where, record in _read_records(Path(path), ("prompt", "answer")):
        prompt, answer = record.pop("prompt"), record.pop("answer")
        difficulty = record.pop("difficulty", None)
        if difficulty is not None and not _is_fraction(difficulty):
            raise ValueError(
                f'{where}: "difficulty" is {json.dumps(difficulty)}; allowed are 0 to 1, or leave '
                "it out"
            )
        tags = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
        messages = () if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else question(prompt)
        prompts.append(Prompt(len(prompts), text, answer, difficulty, tags, messages))
    return prompts


def load_examples(path: str | Path) -> list[TextExample]:
    """(prompt, response) pairs for SFT from a JSONL file; other keys are ignored.

    ``messages`` may stand in place of ``prompt``. If a line has no ``response``, the last of its
    messages is the response, and must be the assistant's.

    Raises: as `read_prompts`.
    """
    records = _read_records(Path(path), ("prompt", "response"))
    return [(record["prompt"], record["response"]) for _, record in records]


def _read_records(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) for each line that is not blank; each key has a non-empty string.

    With ``tests``, the answer may be missing or empty.
    """
    if not path.is_file():
        raise ValueError(f"No file {path}; give a JSONL file whose lines hold {' and '.join(keys)}")
    example = "{" + ", ".join(f'"{key}": "..."' for key in keys) + "}"
    for number, line in _lines(path, keys):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {error} in {line[:80]!r}; expected {example}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: found {line[:80]!r}; expected an object, {example}")
        if "answer" in keys:
            record = _problem_in(record, where)
        _take_messages(record, keys)
        for key in keys:
            if key == "answer" and "tests" in record and not record.get(key):
                record[key] = ""
                continue
            if key == "prompt" and isinstance(record.get(key), list):
                record[key] = check_messages(record[key], where)
                continue
            if key not in record:
                found = ", ".join(record) or "none"
                raise ValueError(f'{where}: no "{key}" among its keys ({found}); write {example}')
            if not isinstance(record[key], str) or not record[key]:
                raise ValueError(
                    f'{where}: "{key}" is {json.dumps(record[key])}; allowed is a non-empty string'
                )
        yield where, record


def _lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for each line that is not blank."""
    empty = True
    try:
        # JSON strings may hold U+2028 and the like, which end no line here.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield number, line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if empty:
        raise ValueError(f"{path} is empty; its lines should hold {' and '.join(keys)}")


def _problem_in(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, or what it says in the keys of this project if a dataset has others."""
    if "tests" in record:
        return record
    try:
        return as_problem(record) or record
    except (ValueError, TypeError, LookupError, SyntaxError) as error:
        keys = ", ".join(record)
        raise ValueError(
            f"{where}: the keys ({keys}) are those of a dataset of programs, but {error!r} came up "
            "while reading it; mend the line, or write it as docs/code_rewards.md says"
        ) from None


def _take_messages(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Let ``messages`` be the prompt, and its last message the response if that is missing."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        return
    record["prompt"] = messages
    del record["messages"]
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    lacks_response = "response" in keys and "response" not in record
    if lacks_response and last.get("role") == "assistant":
        record["prompt"], record["response"] = messages[:-1], last.get("content")


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_prompts(found: object, source: str) -> list[Prompt]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{source} returned {found!r:.80}; expected a non-empty list of Prompt")
    ids: set[int] = set()
    prompts = []
    for index, prompt in enumerate(found):
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"{source} returned {prompt!r:.80} at index {index}; expected a Prompt"
            )
        if prompt.id in ids:
            raise ValueError(
                f"{source} returned two prompts with id {prompt.id}; give each its own, as "
                "success rates are kept by id"
            )
        ids.add(prompt.id)
        if prompt.messages:
            messages = check_messages(prompt.messages, f"{source}, prompt {prompt.id}")
            text = prompt.text or question(messages)
            prompt = replace(prompt, text=text, messages=messages)
        prompts.append(prompt)
    return prompts
