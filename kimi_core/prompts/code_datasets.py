"""Reads lines of published datasets of programming problems as prompts with tests.

Each format is known by its keys. ``as_problem`` turns a line into the keys of this project, which
``kimi_core/reward/code/problem.py`` describes; all other keys of a line are dropped.
"""

import ast
import base64
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
Tests = list[dict[str, Any]]

FAULTS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zlib.error,
)
"""What ``as_problem`` raises if a line has the keys of a format and another content."""


def as_problem(record: Record) -> dict[str, Any] | None:
    """The prompt, answer and tests of a line; None if it has none of these formats.

    >>> as_problem({"text": "Triple x.", "code": "def t(x): return 3*x",
    ...             "test_list": ["assert t(2) == 6"]})["tests"]
    [{'check': 'assert t(2) == 6', 'entry_point': 't', 'setup': ''}]

    Raises: one of ``FAULTS``.
    """
    if MARKS.isdisjoint(record):
        return None
    for keys, read in FORMATS:
        if keys <= record.keys():
            return read(record)
    return None


def _livecodebench(record: Record) -> dict[str, Any]:
    name = _parsed(record.get("metadata") or {}).get("func_name")
    cases = _parsed(record["public_test_cases"]) + _unpacked(record.get("private_test_cases"))
    tests = [
        _call(name, one["input"], one["output"])
        if one.get("testtype") == "functional"
        else _stdin(one["input"], one["output"])
        for one in cases
    ]
    return _problem(record["question_content"], tests, starter=record.get("starter_code"))


def _apps(record: Record) -> dict[str, Any]:
    solutions = _parsed(record.get("solutions") or [])
    tests = _inputs_outputs(_parsed(record["input_output"]))
    starter = record.get("starter_code")
    return _problem(record["question"], tests, next(iter(solutions), ""), starter=starter)


def _verl(record: Record) -> dict[str, Any]:
    truth = record["reward_model"]["ground_truth"]
    try:
        parsed = _parsed(truth)
    except ValueError:
        parsed = truth
    if not isinstance(parsed, dict) or "inputs" not in parsed:
        return {"prompt": record["prompt"], "answer": str(truth)}
    return _problem(record["prompt"], _inputs_outputs(parsed))


def _code_contests(record: Record) -> dict[str, Any]:
    parts = [record.get(f"{kind}_tests") for kind in ("public", "private", "generated")]
    tests = [
        _stdin(given, wanted)
        for part in parts
        if part
        for given, wanted in zip(part["input"], part["output"], strict=True)
    ]
    solutions = record.get("solutions") or {"language": [], "solution": []}
    known = zip(solutions["language"], solutions["solution"], strict=True)
    python = next((text for language, text in known if language in (3, "PYTHON3")), "")
    return _problem(record["description"], tests, python)


def _open_r1(record: Record) -> dict[str, Any]:
    found = _parsed(record["verification_info"])
    if "ground_truth" in found:
        return {"prompt": _asked(record), "answer": str(found["ground_truth"])}
    tests = [
        _call(one["fn_name"], one["input"], one["output"])
        if one.get("fn_name")
        else _stdin(one["input"], one["output"])
        for one in found["test_cases"]
    ]
    answer = record.get("gold_standard_solution") or ""
    return _problem(_asked(record), tests, answer, language=found.get("language", "python"))


def _asked(record: Record) -> Any:
    return record.get("problem") or record["prompt"]


def _codeforces(record: Record) -> dict[str, Any]:
    parts = [record["description"]]
    for key, title in (("input_format", "Input"), ("output_format", "Output"), ("note", "Note")):
        if record.get(key):
            parts.append(f"{title}\n{record[key]}")
    checker = record.get("generated_checker")
    more = {"checker": checker} if checker else {}
    tests = [_stdin(one["input"], one["output"]) | more for one in record["official_tests"]]
    return _problem("\n\n".join(parts), tests)


def _sandbox_fusion(record: Record) -> dict[str, Any]:
    tests = [
        _stdin(one["input"]["stdin"], one["output"]["stdout"]) for one in _parsed(record["test"])
    ]
    language = _parsed(record.get("labels") or {}).get("programming_language", "python")
    answer = record.get("canonical_solution") or ""
    return _problem(record["content"], tests, answer, language=language)


def _mbpp(record: Record) -> dict[str, Any]:
    shown = _parsed(record["test_list"])
    asserts = [*shown, *_parsed(record.get("challenge_test_list") or [])]
    setup = "\n".join(record.get("test_imports") or []) or record.get("test_setup_code") or ""
    text, code = record.get("text") or record["prompt"], record.get("code", "")
    prompt = f"{text}\nYour code should pass these tests:\n" + "\n".join(shown)
    test = {"check": "\n".join(asserts), "entry_point": _called(asserts[0], code), "setup": setup}
    tests = [test]
    if record.get("test"):  # MBPP+ has its inputs there.
        tests.append(test | {"check": record["test"]})
    return _problem(prompt, tests, code)


def _humaneval(record: Record) -> dict[str, Any]:
    test = {"check": record["test"], "entry_point": record["entry_point"]}
    answer = record.get("canonical_solution") or ""
    return _problem(record["prompt"], [test], answer) | {"prefix": record["prompt"]}


def _leetcode(record: Record) -> dict[str, Any]:
    entry_point = record["entry_point"].removeprefix("Solution().")
    test = {"check": record["test"], "entry_point": entry_point, "setup": record["prompt"]}
    starter, code = record.get("starter_code"), record.get("completion")
    answer = f"```python\n{code}\n```" if code else ""
    found = _problem(record["problem_description"], [test], answer, starter=starter)
    return found | {"prefix": record["prompt"]}


FORMATS: tuple[tuple[frozenset[str], Callable[[Record], dict[str, Any]]], ...] = (
    (frozenset({"question_content", "public_test_cases"}), _livecodebench),
    (frozenset({"question", "input_output"}), _apps),
    (frozenset({"prompt", "reward_model"}), _verl),
    (frozenset({"description", "public_tests"}), _code_contests),
    (frozenset({"verification_info"}), _open_r1),
    (frozenset({"description", "official_tests"}), _codeforces),
    (frozenset({"content", "test"}), _sandbox_fusion),
    (frozenset({"test_list"}), _mbpp),
    (frozenset({"problem_description", "prompt", "test", "entry_point"}), _leetcode),
    (frozenset({"prompt", "test", "entry_point"}), _humaneval),
)
"""The keys that a format is known by: LiveCodeBench, APPS and TACO, verl, code_contests, open-r1
(two), SandboxFusion, MBPP, LeetCodeDataset, HumanEval and its successors."""

MARKS = frozenset().union(*(keys for keys, _ in FORMATS)) - {"prompt"}
"""A line of any of the formats has one of these keys."""


def _problem(
    prompt: Any, tests: Tests, answer: str = "", *, language: str = "python", starter: Any = None
) -> dict[str, Any]:
    if starter and isinstance(prompt, str):
        prompt = f"{prompt}\n\nComplete this code:\n{starter}"
    if not tests:
        raise ValueError("it has no tests")
    return {"prompt": prompt, "answer": answer, "tests": tests, "language": language}


def _inputs_outputs(found: Record) -> Tests:
    """Tests in the form of APPS: lists of inputs and outputs, with ``fn_name`` for calls."""
    pairs = zip(found["inputs"], found["outputs"], strict=True)
    if name := found.get("fn_name"):
        return [_call(name, given, wanted, wrapped=True) for given, wanted in pairs]
    return [_stdin(given, wanted) for given, wanted in pairs]


def _stdin(given: Any, wanted: Any) -> dict[str, Any]:
    return {"stdin": _lines(given), "stdout": _lines(wanted)}


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(name: Any, given: Any, wanted: Any, *, wrapped: bool = False) -> dict[str, Any]:
    """A call, whose arguments stand in a list, or one a line as JSON."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of the function is {name!r}")
    if isinstance(given, str):
        given, wanted = [json.loads(line) for line in given.splitlines() if line], _parsed(wanted)
    test = {"entry_point": name, "args": given, "result": wanted}
    return test | {"wrapped": True} if wrapped else test


def _called(source: str, code: str) -> str:
    """The function that an assert is about: defined in ``code``, otherwise the first called."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [one.id for one in calls if isinstance(one, ast.Name) and not hasattr(builtins, one.id)]
    defined = set(_defined(code))
    found = [name for name in names if name in defined] or names
    if not found:
        raise ValueError(f"{source!r:.80} calls no function")
    return found[0]


def _defined(code: str) -> Iterator[str]:
    try:
        nodes = ast.parse(code).body
    except SyntaxError:
        return
    yield from (node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _parsed(value: Any) -> Any:
    """JSON or Python literals in a text, or what is parsed already."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{value!r:.80} is neither JSON nor a Python literal") from None


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickled {module}.{name} among the tests; allowed is text")


def _unpacked(value: Any) -> list[Any]:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickled JSON text."""
    if not value:
        return []
    try:
        found: list[Any] = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
        found = json.loads(text)
    return found
