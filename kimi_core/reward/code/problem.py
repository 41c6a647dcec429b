"""The problem that a prompt carries, and the program in a response.

A prompt carries its problem in its tags, so a line of a JSONL file is enough::

    {"prompt": "Print the sum of two numbers.", "answer": "print(sum(map(int, input().split())))",
     "tests": [{"stdin": "1 2\n", "stdout": "3\n"}]}
    {"prompt": "def triple(x):\n", "answer": "    return 3 * x", "prefix": "def triple(x):\n",
     "tests": [{"check": "assert triple(2) == 6", "entry_point": "triple"}]}

``answer`` is a reference solution. Nothing here reads it.
"""

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from kimi_core.types import Prompt

Language = Literal["python", "c++"]

FENCES: dict[str, frozenset[str]] = {
    "python": frozenset({"python", "python3", "py"}),
    "c++": frozenset({"c++", "cpp", "cc", "cxx"}),
}
"""What may follow the three backticks of a block in each language."""

ENDS_A_COMPLETION = ("class ", "class:", "def ", "#", "if ", "print(", "print ", "```")
"""A line that begins like this ends the continuation of a function: the stop sequences of the Codex
paper (Chen et al. 2021, section 2.1), and a fence."""


@dataclass(frozen=True)
class IoTest:
    """Text for standard input, and the expected standard output."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CheckTest:
    """Asserts about one function, as source: at the top level or in ``check(candidate)``.

    ``setup`` is more source that the asserts need: helpers, imports.
    """

    check: str
    entry_point: str
    setup: str = ""


Test = IoTest | CheckTest


@dataclass(frozen=True)
class Problem:
    """What a program is tested on.

    ``prefix`` is source that a response without a fenced block continues, such as the head of a
    function; with a block, it stands in front of the block.
    """

    tests: tuple[Test, ...]
    language: Language = "python"
    prefix: str = ""


def problem_of(prompt: Prompt) -> Problem:
    """The problem in the tags ``tests`` (JSON), ``language`` and ``prefix`` of a prompt.

    Raises:
        ValueError: there is none, or it is malformed; the message names the prompt.
    """
    where = f"Prompt {prompt.id}"
    if "tests" not in prompt.tags:
        raise ValueError(
            f'{where} has no tests; the code reward needs "tests", a list, next to "prompt" and '
            '"answer" (docs/code_rewards.md)'
        )
    try:
        listed = json.loads(prompt.tags["tests"])
    except json.JSONDecodeError as error:
        raise ValueError(f'{where}: "tests" is not JSON: {error}') from None
    if not isinstance(listed, list) or not listed:
        raise ValueError(f'{where}: "tests" is {listed!r:.80}; allowed is a non-empty list')
    language = prompt.tags.get("language", "python")
    if language not in FENCES:
        raise ValueError(f'{where}: "language" is {language!r}; allowed are {", ".join(FENCES)}')
    tests = tuple(_read_test(one, where) for one in listed)
    if language != "python" and any(isinstance(one, CheckTest) for one in tests):
        raise ValueError(f'{where}: a "check" calls a Python function; {language} takes "stdin"')
    return Problem(tests, language, prompt.tags.get("prefix", ""))  # type: ignore[arg-type]


def _read_test(found: Any, where: str) -> Test:
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        if found.keys() == {"stdin", "stdout"}:
            return IoTest(**found)
        if {"check", "entry_point"} <= found.keys() <= {"check", "entry_point", "setup"}:
            return CheckTest(**found)
    raise ValueError(
        f'{where}: {json.dumps(found)[:80]} is no test; allowed are {{"stdin", "stdout"}} and '
        '{"check", "entry_point"} with or without "setup", all of them strings'
    )


def extract_program(problem: Problem, response: str) -> str:
    """The program that a response stands for.

    Its last fenced block in the language; failing that, the last block without a language; failing
    that, the whole response. A block that is never closed goes to the end.

    Where the problem has a ``prefix``, that comes first. A response that goes on with it, as it
    has no block or begins with an indented line, is cut where it turns to something else
    (``ENDS_A_COMPLETION``).

    >>> extract_program(Problem(()), "Let me see.\\n```python\\nprint(1)\\n```\\nDone.")
    'print(1)\\n'
    >>> extract_program(Problem((), prefix="def f(x):\\n"), "    return x\\n\\ndef g(): pass")
    'def f(x):\\n    return x\\n\\n'
    """
    blocks = _fenced_blocks(response)
    named = [text for language, text in blocks if language in FENCES[problem.language]]
    plain = [text for language, text in blocks if not language]
    found = named or plain
    if not problem.prefix:
        return found[-1] if found else response
    if found and not response.lstrip("\r\n").startswith((" ", "\t")):
        return f"{problem.prefix}\n{found[-1]}"
    first, *rest = response.splitlines(keepends=True) or [""]
    others = takewhile(lambda line: not line.startswith(ENDS_A_COMPLETION), rest)
    return problem.prefix + first + "".join(others)


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, contents) of each block between lines of three backticks."""
    blocks: list[tuple[str, str]] = []
    inside: list[str] | None = None
    language = ""
    for line in text.splitlines(keepends=True):
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, language = [], line.strip().strip("`").strip().lower()
        else:
            blocks.append((language, "".join(inside)))
            inside = None
    if inside is not None:
        blocks.append((language, "".join(inside)))
    return blocks
