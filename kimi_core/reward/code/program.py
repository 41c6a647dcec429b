"""The program in a response."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from kimi_core.reward.code.problem import FENCES, IoTest, Problem
from kimi_core.reward.thoughts import after_thoughts

ENDS_A_COMPLETION = ("class ", "class:", "def ", "#", "if ", "print(", "print ", "```")
"""A line that begins like this ends the continuation of a function: the stop sequences of the Codex
paper (Chen et al. 2021, section 2.1), and a fence."""

FENCE = re.compile(r"`{3,}|~{3,}")
DEEPEST = 3
"""Most spaces before a closing fence, without those before the opening one."""

LANGUAGE = re.compile(r"[a-z]+\+*", re.IGNORECASE)
READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bcin\b|\bscanf\b|\bgetline\b")


@dataclass(frozen=True)
class Block:
    language: str
    """In lower case; empty: none is named."""
    text: str


def extract_program(problem: Problem, response: str) -> str:
    """The program that a response stands for.

    The last fenced block in the problem's language that defines what is asked for: the function, or
    a program that reads input. Failing that, the last block in the language, the last block without
    a language, the whole response. A block that is never closed goes to the end. A block in the
    thoughts counts only if none comes after them.

    Where the problem has a ``prefix``, that comes first. A response that goes on with it, as it
    has no block or begins with an indented line, is cut where it turns to something else
    (``ENDS_A_COMPLETION``).

    >>> extract_program(Problem(()), "Let me see.\\n```python\\nprint(1)\\n```\\nDone.")
    'print(1)\\n'
    >>> extract_program(Problem((), prefix="def f(x):\\n"), "    return x\\n\\ndef g(): pass")
    'def f(x):\\n    return x\\n\\n'
    """
    answer = after_thoughts(response)
    blocks = fenced_blocks(answer) or fenced_blocks(response)
    named = [one.text for one in blocks if one.language in FENCES[problem.language]]
    plain = [one.text for one in blocks if not one.language]
    found = _best(problem, named or plain)
    if not problem.prefix:
        return answer if found is None else found
    if found is not None and not answer.lstrip("\r\n").startswith((" ", "\t")):
        return f"{problem.prefix}\n{found}"
    first, *rest = answer.splitlines(keepends=True) or [""]
    others = takewhile(lambda line: not line.startswith(ENDS_A_COMPLETION), rest)
    return problem.prefix + first + "".join(others)


def _best(problem: Problem, blocks: Sequence[str]) -> str | None:
    """The last block that defines what is asked for, otherwise the last one."""
    names = {test.entry_point for test in problem.tests if not isinstance(test, IoTest)}
    asked = READS_INPUT
    if names:
        any_name = "|".join(map(re.escape, sorted(names)))
        asked = re.compile(rf"^\s*(?:(?:async\s+)?def|class)\s+(?:{any_name})\b", re.MULTILINE)
    fitting = [text for text in blocks if asked.search(text)]
    return fitting[-1] if fitting else blocks[-1] if blocks else None


def fenced_blocks(text: str) -> list[Block]:
    """The blocks between fences of three or more backticks or tildes, as models write them.

    A fence may be indented or quoted with ``> ``, stand behind text, and name its language in any
    of the usual ways. It may close at the end of a line of code.

    >>> fenced_blocks("So: ```{.python}\\nprint(1)```")
    [Block(language='python', text='print(1)\\n')]
    """
    blocks: list[Block] = []
    inside: list[str] | None = None
    mark = language = before = ""
    for line in text.splitlines(keepends=True):
        if inside is None:
            opened = FENCE.search(line)
            if opened and opened[0][0] not in line[opened.end() :]:  # Not closed in the same line.
                mark, language = opened[0], _language(line[opened.end() :])
                before = line[: opened.start()]
                inside = []
            continue
        line = _without(before, line)
        bare = line.strip()
        # Deeper in, it is a line of the code, such as of a docstring (CommonMark 4.5).
        closes = bare.startswith(mark) and line.index(mark) <= DEEPEST
        code = bare.removesuffix(mark).rstrip()
        if not closes and (code == bare or not code or mark[0] in code):
            inside.append(line)
            continue
        if not closes:
            inside.append(line[: line.rindex(mark)].rstrip() + "\n")
        blocks.append(Block(language, "".join(inside)))
        inside = None
    if inside is not None:
        blocks.append(Block(language, "".join(inside)))
    return [block for block in blocks if block.text.strip()]


def _without(before: str, line: str) -> str:
    """A line without the indentation or the quote marks that stood before its fence."""
    if not before.strip("> \t"):
        if line.startswith(before):
            return line[len(before) :]
        if ">" in before and line.lstrip().startswith(">"):
            return line.lstrip()[1:].removeprefix(" ")
    return line


def _language(info: str) -> str:
    """The language in what follows a fence, as in ``{.python}`` or ``Python 3 title="a"``."""
    found = LANGUAGE.match(info.strip().lstrip("{. "))
    return found[0].lower() if found else ""
