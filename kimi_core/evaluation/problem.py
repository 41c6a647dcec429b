"""A problem of a benchmark, whatever file it came from."""

from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Problem(NamedTuple):
    """What a line holds."""

    question: str
    answer: str
    subject: str = ""
    options: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()
    """References as in a JSONL line of prompts; each ``IMAGE_MARK`` is the place of one."""


def with_options(problem: Problem) -> Problem:
    """The problem, whose answer has to be the letter of an option. Raises ValueError."""
    if problem.answer not in [*LETTERS[: len(problem.options)]]:
        raise ValueError(f"the answer {problem.answer!r} is none of {len(problem.options)} options")
    return problem
