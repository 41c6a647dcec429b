"""Published benchmarks from local files, in the formats that their authors publish.

| name | what a line holds | judged by |
|---|---|---|
| ``aime`` | ``problem`` (or ``question``) and ``answer``, in any case | final answer |
| ``math-500`` | ``problem``, ``answer``; those of MATH: a boxed ``solution`` | final answer |
| ``gsm8k`` | ``question`` and ``answer``, which ends with ``#### 72`` | final answer |
| ``mmlu`` | ``question``, ``choices``, ``answer`` from 0; or the original CSV | letter |
| ``mmlu-pro`` | ``question``, ``options`` and ``answer``, a letter | letter |
| ``mathvista``, ``mmmu`` | as ``image_benchmarks.py``, with images | letter, or final answer |
| ``humaneval``, ``mbpp``, ``livecodebench`` | as ``prompts/code_datasets.py`` | tests |
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from kimi_core.config import RewardConfig
from kimi_core.evaluation.image_benchmarks import mathvista, mmmu
from kimi_core.evaluation.problem import LETTERS, Problem, with_options
from kimi_core.prompts.images import take_images
from kimi_core.prompts.jsonl import PROMPT_KEYS, Place, lines_in, prompt_in
from kimi_core.prompts.tables import records_of
from kimi_core.reward.base import RewardFunction
from kimi_core.reward.code.reward import code_reward
from kimi_core.reward.math.extract import extract
from kimi_core.reward.math.reward import MathReward
from kimi_core.tasks import humaneval
from kimi_core.types import Prompt

Line = Mapping[str, Any]
Kind = Literal["math", "choice", "code", "mixed"]
"""What is judged: a final answer, a letter, or a program. ``mixed``: a letter if it has options."""

ASK: dict[Kind, str] = {
    "math": "{question}\n\nReason step by step, and put your final answer within \\boxed{}.",
    "choice": '{question}\n\n{options}\n\nThink step by step. End with a line "Answer: X", where X '
    "is the letter of the right option.",
    "code": "{question}",
    "mixed": "as `choice` with options, otherwise as `math`",
}
"""How the problems of each kind are asked."""


def _aime(line: Line) -> Problem:
    lower = {key.lower(): value for key, value in line.items()}
    question = lower["problem"] if "problem" in lower else lower["question"]
    return Problem(question, str(lower["answer"]))


def _math(line: Line) -> Problem:
    answer = line["answer"] if "answer" in line else extract(line["solution"], ["boxed"])
    if answer is None:
        raise ValueError("the solution has no \\boxed{} answer")
    return Problem(line["problem"], answer, line.get("subject") or line.get("type") or "")


def _gsm8k(line: Line) -> Problem:
    _, mark, answer = line["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no ####")
    return Problem(line["question"], answer.strip())


def _mmlu(line: Line) -> Problem:
    options, right = tuple(line["choices"]), line["answer"]
    letter = LETTERS[right] if isinstance(right, int) else right
    return with_options(Problem(line["question"], letter, line.get("subject") or "", options))


def _mmlu_pro(line: Line) -> Problem:
    subject = line.get("category") or ""
    options = tuple(line["options"])
    return with_options(Problem(line["question"], line["answer"], subject, options))


BENCHMARKS: dict[str, tuple[Kind, Callable[[Line], Problem] | None]] = {
    "aime": ("math", _aime),
    "math-500": ("math", _math),
    "gsm8k": ("math", _gsm8k),
    "mmlu": ("choice", _mmlu),
    "mmlu-pro": ("choice", _mmlu_pro),
    "mathvista": ("mixed", mathvista),
    "mmmu": ("mixed", mmmu),
    "humaneval": ("code", None),
    "mbpp": ("code", None),
    "livecodebench": ("code", None),
}


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The files of a folder that are read."""


def files_of(name: str, data: Path | None) -> list[Path]:
    """The files of a benchmark: the one given, or those of the folder in the order of their names.

    Raises:
        ValueError: there are none; without any, only HumanEval is known, from its package.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"No benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if data is None:
        if name == "humaneval":
            return []
        raise ValueError(
            f"--benchmark {name} needs --data: a file or a folder of JSONL, JSON, CSV or Parquet"
        )
    if data.is_file():
        return [data]
    found = sorted(path for path in data.rglob("*") if path.suffix in SUFFIXES)
    if not found:
        raise ValueError(f"No .jsonl, .json, .csv or .parquet file in {data}")
    return found


def load_benchmark(name: str, files: list[Path]) -> list[Prompt]:
    """The problems of a benchmark as prompts, numbered from 0. ``tags["subject"]`` may be empty.

    Raises:
        ValueError: a line is not in the benchmark's format; the message names it.
    """
    kind, read = BENCHMARKS[name]
    if read is None:
        return _programs(files)
    asked = enumerate(_problems(name, read, files))
    return [_prompt(row, kind, problem, path) for row, (path, problem) in asked]


def questions_of(name: str, files: list[Path]) -> list[str]:
    """The problems as they are published, without our request for an answer.

    Raises: as `load_benchmark`.
    """
    _, read = BENCHMARKS[name]
    if read is None:
        return [one.text for one in _programs(files)]
    return [one.question for _, one in _problems(name, read, files)]


def _programs(files: list[Path]) -> list[Prompt]:
    if not files:
        return humaneval.prompts()
    places = [(path, *one) for path in files for one in lines_in(path, PROMPT_KEYS)]
    return [
        prompt_in(line, row, Place(path, number))
        for row, (path, _, number, line) in enumerate(places)
    ]


def _problems(
    name: str, read: Callable[[Line], Problem], files: list[Path]
) -> list[tuple[Path, Problem]]:
    problems = []
    for path in files:
        for number, line in _lines(path):
            try:
                problems.append((path, _checked(read(line))))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                keys = ", ".join(map(str, line)) if isinstance(line, dict) else repr(line)[:80]
                raise ValueError(
                    f"{path}, line {number} is not in the format of {name} "
                    f"({type(error).__name__}: {error}); it has {keys or 'no keys'}"
                ) from None
    if not problems:
        raise ValueError(f"There are no problems in {', '.join(map(str, files))}")
    return problems


def _checked(problem: Problem) -> Problem:
    texts = (problem.question, problem.answer, *problem.options)
    if not (all(isinstance(one, str) for one in texts) and problem.question and problem.answer):
        raise ValueError("the question or the answer is empty, or something is not text")
    return problem


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """What each line holds; of a JSON file, the entries of its list, or its one object."""
    if path.suffix == ".parquet":
        yield from enumerate(records_of(str(path)), 1)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
                question, *choices = row or [""]
                answer = choices.pop() if choices else ""
                yield number, {"question": question, "choices": choices, "answer": answer}
            return
        if path.suffix == ".json":
            found = json.loads(text)
            yield from enumerate(found if isinstance(found, list) else [found], 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from None


def _prompt(row: int, kind: Kind, problem: Problem, path: Path) -> Prompt:
    if kind == "mixed":
        kind = "choice" if problem.options else "math"
    named = zip(LETTERS, problem.options, strict=False)
    options = "\n".join(f"{letter}) {option}" for letter, option in named)
    text = ASK[kind].replace("{options}", options).replace("{question}", problem.question)
    tags = {"subject": problem.subject, "judged": kind}
    record = {"prompt": text, "images": list(problem.images)}
    images = take_images(record, Place(path, row + 1)) if problem.images else ()
    return Prompt(row, text, problem.answer, tags=tags, images=images)


CHOSEN = (
    re.compile(r"\\boxed\{\s*(?:\\(?:text|textbf|mathrm)\{)?\s*\(?([A-Z])\b"),
    re.compile(r"(?i:answer(?: is)?)\W{0,6}(?:(?i:option)\s+)?([A-Z])(?![\w'])"),
    re.compile(r"^\W*([A-Z])(?:[).:]|\W*$)", re.M),
)


def chosen(text: str) -> str | None:
    """The option that a response names last: in a box, behind "answer", or at a line's start.

    Lines that begin with several options only repeat them.

    >>> chosen("A) is wrong, so it is B.\\nAnswer: (B)"), chosen("I do not know.")
    ('B', None)
    >>> chosen("B) 7"), chosen("A) 5\\nB) 7")
    ('B', None)
    """
    *named, alone = (pattern.findall(text) for pattern in CHOSEN)
    for found in named:
        if found:
            return str(found[-1])
    return str(alone[0]) if len(set(alone)) == 1 else None


def reward_of(name: str, config: RewardConfig) -> RewardFunction:
    """What judges the answers to a benchmark.

    Raises:
        ValueError: math-verify is missing, or programs cannot be run safely here.
    """
    kind = BENCHMARKS[name][0]
    if kind == "choice":
        return choice
    if kind == "mixed":
        return Mixed(MathReward(config.math))
    return MathReward(config.math) if kind == "math" else code_reward(config.sandbox)


def choice(prompt: Prompt, response: str) -> float:
    """The reward of multiple choice: 1 if the right option is chosen."""
    return float(chosen(response) == prompt.answer)


class Mixed:
    """The reward of problems of which some have options. Thread-safe, as ``math`` is."""

    __name__ = "mixed"

    def __init__(self, math: MathReward) -> None:
        self._math = math

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Raises: as ``MathReward``."""
        has_options = prompt.tags["judged"] == "choice"
        return choice(prompt, response) if has_options else self._math(prompt, response)

    def close(self) -> None:
        self._math.close()
