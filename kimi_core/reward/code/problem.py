"""The problem that a prompt carries.

A prompt carries its problem in its tags, so a line of a JSONL file is enough::

    {"prompt": "Print the sum of two numbers.", "answer": "print(sum(map(int, input().split())))",
     "tests": [{"stdin": "1 2\n", "stdout": "3\n"}]}
    {"prompt": "def triple(x):\n", "answer": "    return 3 * x", "prefix": "def triple(x):\n",
     "tests": [{"check": "assert triple(2) == 6", "entry_point": "triple"}]}
    {"prompt": "class Solution:\n    def triple(self, x): ...",
     "tests": [{"entry_point": "triple", "args": [2], "result": 6}]}

``answer``, a reference solution, may be left out. ``kimi_core/prompts/code_datasets.py`` makes such
lines of the datasets that others publish.
"""

import json
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from kimi_core.types import Prompt

Language = Literal["python", "c++"]

FENCES: dict[str, frozenset[str]] = {
    "python": frozenset({"python", "py", "pypy"}),
    "c++": frozenset({"c++", "cpp", "cc", "cxx"}),
}
"""Names of each language, without a number (``python3``): in problems and behind fences."""


@dataclass(frozen=True)
class IoTest:
    """Text for standard input, and the expected standard output."""

    stdin: str
    stdout: str
    tolerance: float = 0.0
    """How far a printed number may lie from the expected one, see ``output.same_output``."""
    checker: str = ""
    """Python source that judges the output in place of the comparison. It is run with three
    arguments, the files of input, expected output and output. It accepts if it exits with 0 and the
    last word that it prints is no number, or one above 0."""


@dataclass(frozen=True)
class CheckTest:
    """Asserts about one function, as source: at the top level or in ``check(candidate)``.

    ``setup`` is more source that the asserts need: helpers, imports.
    """

    check: str
    entry_point: str
    setup: str = ""


@dataclass(frozen=True)
class CallTest:
    """One call of a function, or of a method of ``class Solution``, and its result; all as JSON."""

    entry_point: str
    args: str
    """A list."""
    result: str
    """Compared as JSON: a tuple is a list, and numbers are compared as by ``==``."""
    wrapped: bool = False
    """Whether the result may stand in a list of one, as APPS writes some of its results."""


Test = IoTest | CheckTest | CallTest


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: "tests" is not JSON: {error}') from None
    if not isinstance(listed, list) or not listed:
        raise ValueError(f'{where}: "tests" is {listed!r:.80}; allowed is a non-empty list')
    language = language_of(prompt.tags.get("language", "python"), where)
    tests = tuple(_read_test(one, where) for one in listed)
    if language != "python" and any(not isinstance(one, IoTest) for one in tests):
        raise ValueError(f'{where}: only "stdin" tests a program in {language}; a test has another')
    return Problem(tests, language, prompt.tags.get("prefix", ""))


def check_sources(prompt: Prompt) -> None:
    """Compile the Python sources in the tests of a prompt.

    Raises:
        ValueError: there is no problem, or a check or checker cannot run or never calls the
            function under test.
    """
    where = f"Prompt {prompt.id}"
    for test in problem_of(prompt).tests:
        if isinstance(test, IoTest):
            _compile(test.checker, f"{where}: the checker")
        elif isinstance(test, CheckTest):
            _compile(test.setup, f'{where}: "setup"')
            _compile(test.check, f'{where}: "check"')
            if not re.search(rf"\b(?:candidate|{re.escape(test.entry_point)})\b", test.check):
                raise ValueError(f'{where}: "check" never calls {test.entry_point!r}')


def _compile(source: str, what: str) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "source", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        if "integer string conversion" not in str(error):  # The sandbox has no such limit.
            raise ValueError(f"{what} is not Python: {error}") from None


def language_of(name: str, where: str) -> Language:
    """``python`` or ``c++`` from any of its names.

    Raises:
        ValueError: it is another language.
    """
    for language, names in FENCES.items():
        if name.lower().rstrip("0123456789. ") in names:
            return language  # type: ignore[return-value]
    allowed = ", ".join(sorted({*FENCES["python"], *FENCES["c++"]}))
    raise ValueError(f'{where}: "language" is {name!r}; allowed are {allowed}')


def _read_test(found: Any, where: str) -> Test:
    if isinstance(found, dict) and {"entry_point", "args", "result"} <= found.keys():
        if isinstance(found["args"], list) and isinstance(found["entry_point"], str):
            args, result = json.dumps(found["args"]), json.dumps(found["result"])
            return CallTest(found["entry_point"], args, result, bool(found.get("wrapped")))
    elif isinstance(found, dict):
        texts = {key: value for key, value in found.items() if key != "tolerance"}
        if all(isinstance(value, str) for value in texts.values()):
            if {"stdin", "stdout"} <= found.keys() <= {"stdin", "stdout", "tolerance", "checker"}:
                return IoTest(**texts, tolerance=_tolerance(found.get("tolerance", 0.0), where))
            if {"check", "entry_point"} <= found.keys() <= {"check", "entry_point", "setup"}:
                return CheckTest(**found)
    raise ValueError(
        f'{where}: {json.dumps(found)[:80]} is no test; allowed are {{"stdin", "stdout"}} with or '
        'without "tolerance" and "checker", {"check", "entry_point"} with or without "setup", and '
        '{"entry_point", "args", "result"} with a list of arguments; all others are strings'
    )


def _tolerance(value: Any, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError(f'{where}: "tolerance" is {value!r}; allowed is a number from 0 to below 1')
