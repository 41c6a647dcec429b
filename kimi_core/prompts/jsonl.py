"""Reads prompts and SFT examples from JSONL files."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_core.prompts.code_datasets import FAULTS, MARKS, as_problem
from kimi_core.prompts.columns import Columns
from kimi_core.prompts.images import take_images
from kimi_core.prompts.messages import check_messages, question
from kimi_core.prompts.place import Place
from kimi_core.types import Message, Prompt

TextExample = tuple[str | Sequence[Message] | Prompt, str]
"""A prompt, as text, as messages, or with images as a `Prompt`; and its response."""

PROMPT_KEYS = ("prompt", "answer")
EXAMPLE_KEYS = ("prompt", "response")
BOM = b"\xef\xbb\xbf"
PLAIN = Columns()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a JSONL file, numbered from 0: ``prompt`` and ``answer``. A number
    as the answer becomes text.

    ``messages`` may stand in place of ``prompt``: a list of objects with ``role`` and ``content``.
    ``images`` lists paths or data URIs, see ``prompts/images.py``. ``difficulty`` is optional, and
    so is ``answer`` where there are ``tests``; other keys become tags, as text. Lines of published
    datasets of programs are read as they are, see ``code_datasets``.

    Raises:
        ValueError: the file is missing or empty, or a line is bad; the message says what was found.
    """
    path = Path(path)
    lines = enumerate(lines_in(path, PROMPT_KEYS))
    return [prompt_in(line, row, Place(path, number)) for row, (_, number, line) in lines]


def load_examples(path: str | Path, columns: Columns = PLAIN) -> list[TextExample]:
    """(prompt, response) pairs for SFT from a JSONL file; other keys are ignored.

    ``messages`` may stand in place of ``prompt``. If a line has no ``response``, the last of its
    messages is the response, and must be the assistant's.

    Raises: as `read_prompts`.
    """
    path = Path(path)
    lines = lines_in(path, EXAMPLE_KEYS)
    return [
        example_of(_object(line, EXAMPLE_KEYS, Place(path, number)), Place(path, number), columns)
        for _, number, line in lines
    ]


def example_of(record: Mapping[str, Any], where: Place, columns: Columns = PLAIN) -> TextExample:
    """The example that a record holds.

    Raises: ValueError as `read_prompts`.
    """
    record = _checked(_in_our_words(columns.example, record, where), EXAMPLE_KEYS, where)
    prompt, response, images = record["prompt"], record["response"], record["images"]
    if not images:
        return prompt, response
    if isinstance(prompt, str):
        return Prompt(0, prompt, response, images=images), response
    return Prompt(0, question(prompt), response, messages=prompt, images=images), response


def lines_in(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset in bytes, number counted from 1, line) of each line that is not blank.

    Raises:
        ValueError: there is no such file, or all of its lines are blank.
    """
    if not path.is_file():
        raise ValueError(f"No file {path}; give a JSONL file whose lines hold {' and '.join(keys)}")
    empty, offset = True, 0
    with path.open("rb") as file:
        if file.read(len(BOM)) == BOM:
            offset = len(BOM)
        file.seek(offset)
        for number, line in enumerate(file, 1):
            if not line.isspace():
                empty = False
                yield offset, number, line.removesuffix(b"\n")
            offset += len(line)
    if empty:
        raise ValueError(f"{path} is empty; its lines should hold {' and '.join(keys)}")


def prompt_in(line: bytes, id_: int, where: Place, columns: Columns = PLAIN) -> Prompt:
    """The prompt that a line holds.

    Raises: ValueError as `read_prompts`.
    """
    return prompt_of(_object(line, PROMPT_KEYS, where), id_, where, columns)


def prompt_of(
    record: Mapping[str, Any], id_: int, where: Place, columns: Columns = PLAIN
) -> Prompt:
    """The prompt that a record holds.

    Raises: ValueError as `read_prompts`.
    """
    renamed = _in_our_words(columns.prompt, record, where)
    record = _checked(_problem_in(renamed, where), PROMPT_KEYS, where)
    prompt, answer = record.pop("prompt"), record.pop("answer")
    images = record.pop("images")
    difficulty = record.pop("difficulty", None)
    if difficulty is not None and not _is_fraction(difficulty):
        raise ValueError(
            f'{where}: "difficulty" is {json.dumps(difficulty)}; allowed are 0 to 1, or leave it '
            "out"
        )
    tags = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in record.items()}
    if isinstance(prompt, str):
        return Prompt(id_, prompt, answer, difficulty, tags, images=images)
    return Prompt(id_, question(prompt), answer, difficulty, tags, prompt, images)


def plain_records(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The records of many lines, in a fifth of the time that `prompt_in` takes for each.

    None: at least one line is malformed, or holds messages or tests, so that each line must be
    parsed alone. All lines are parsed as one JSON list. A random string stands between any two, so
    that no line can reach into the next one unnoticed.
    """
    between = secrets.token_hex(8)
    separator = f',"{between}",'
    try:
        found = json.loads(f"[{separator.encode().join(lines).decode()}]")
    except (ValueError, RecursionError):
        return None
    records, separators = found[::2], found[1::2]
    if len(records) != len(lines) or separators.count(between) != len(lines) - 1:
        return None
    if set(map(type, records)) != {dict} or not NOT_PLAIN.isdisjoint(set().union(*records)):
        return None
    for key in PROMPT_KEYS:
        values = [record.get(key) for record in records]
        if set(map(type, values)) != {str} or not all(values):
            return None
    measured = [record["difficulty"] for record in records if "difficulty" in record]
    are_numbers = set(map(type, measured)) <= {float, int, type(None)}
    if are_numbers and all(one is None or 0 <= one <= 1 for one in measured):
        return records
    return None


NOT_PLAIN = MARKS | {"messages", "tests", "images"}
"""Keys of lines that are not just a prompt, an answer and tags."""


def _in_our_words(
    read: Callable[[Mapping[str, Any]], dict[str, Any]], record: Mapping[str, Any], where: Place
) -> dict[str, Any]:
    try:
        return read(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; mend `fields` or `template`") from None


def _checked(record: dict[str, Any], keys: tuple[str, ...], where: Place) -> dict[str, Any]:
    """The record, in which each key has a non-empty string, with its images.

    With ``tests``, the answer may be missing or empty; with images, the prompt may be empty.
    """
    _take_messages(record, keys)
    images = take_images(record, where)
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and value:
            continue
        may_be_empty = "tests" in record if key == "answer" else images
        if key in PROMPT_KEYS and may_be_empty and not value:
            record[key] = ""
        elif key == "prompt" and isinstance(value, list):
            record[key] = check_messages(value, where)
        elif key not in record:
            found = ", ".join(record) or "none"
            raise ValueError(
                f'{where}: no "{key}" among its keys ({found}); write {_example(keys)}'
            )
        else:
            raise ValueError(
                f'{where}: "{key}" is {json.dumps(value, default=str):.80}; allowed is a non-empty '
                "string"
            )
    record["images"] = images
    return record


def _object(line: bytes, keys: tuple[str, ...], where: Place) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where.path} is not UTF-8 text: line {where.number}: {error}") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error} in {text[:80]!r}; expected {_example(keys)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {text[:80]!r}; expected an object, {_example(keys)}")
    return record


def _example(keys: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{key}": "..."' for key in keys) + "}"


def _problem_in(record: dict[str, Any], where: Place) -> dict[str, Any]:
    """The record, or what it says in the keys of this project if a dataset has others."""
    if "tests" in record:
        return record
    try:
        return as_problem(record) or record
    except FAULTS as error:
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
