"""Checks that only compare calls with literals. Their answers can be judged without running them.

Most checks consist only of ``assert f(1, 2) == [3]``. Calls and expected values are then in the
source, so one sandbox suffices: the answers are compared here, as plain data.
"""

import ast
import json
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from kimi_core.reward.code.check_driver import decode, encode
from kimi_core.reward.code.problem import CallTest, CheckTest

Case = tuple[dict[str, Any], Any]
"""A call as ``check_driver`` takes it, and its expected value."""

_PARSER = threading.Lock()
"""Threads take turns: CPython 3.11 counts the depth of a conversion for all of them together, and
once ended one in a SystemError."""

SCALARS = (bool, int, float, str)

NUMBERS = {"int", "complex", "Decimal", "Fraction"}
"""Coded values that may equal a number, and cost no more to read than their length."""


@lru_cache(maxsize=65536)
def literal_cases(test: CheckTest) -> tuple[Case, ...] | None:
    """The calls of a check and their expected values; None if the check does anything else.

    Expected values with sets or dicts are left to the check itself. To build sets here from the
    output of a program would let the program choose how long that takes.

    >>> literal_cases(CheckTest("assert f(1, n=[2]) == (3,)", "f"))
    (({'args': [1], 'kwargs': {'dict': [['n', {'list': [2]}]]}}, (3,)),)
    """
    try:
        with _PARSER:
            statements: list[ast.stmt] = ast.parse(test.check).body
    except SyntaxError:
        return None
    functions = [one for one in statements if isinstance(one, ast.FunctionDef)]
    if functions:
        checked, *others = functions
        if others or checked.name != "check" or any(isinstance(s, ast.Assert) for s in statements):
            return None
        statements = [one for one in statements if one is not checked] + checked.body
        names = {test.entry_point, *(argument.arg for argument in checked.args.args)}
    else:
        names = {test.entry_point, "candidate"}
    asserts = [one for one in statements if not _does_nothing(one)]
    cases = [_case(one, names) for one in asserts]
    found = tuple(case for case in cases if case is not None)
    return found if found and len(found) == len(cases) else None


def _does_nothing(statement: ast.stmt) -> bool:
    """A docstring, ``assert True``, or ``METADATA = {...}`` with literals only."""
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and bool(statement.test.value)
    if isinstance(statement, ast.Assign):
        names = [getattr(target, "id", "") for target in statement.targets]
        return names == ["METADATA"]
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _case(statement: ast.stmt, names: set[str]) -> Case | None:
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        return None
    compared = statement.test
    call = compared.left
    if len(compared.ops) != 1 or not isinstance(compared.ops[0], ast.Eq):
        return None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return None
    if call.func.id not in names or any(keyword.arg is None for keyword in call.keywords):
        return None
    try:
        args = [encode(ast.literal_eval(argument)) for argument in call.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        expected = ast.literal_eval(compared.comparators[0])
    except (ValueError, TypeError):
        return None
    if not _is_comparable(expected):
        return None
    return {"args": args, "kwargs": encode(kwargs)}, expected


def _is_comparable(expected: object) -> bool:
    if isinstance(expected, list | tuple):
        return all(map(_is_comparable, expected))
    return expected is None or isinstance(expected, SCALARS)


def call_of(test: CallTest) -> dict[str, Any]:
    """The call of a test, as ``check_driver`` takes it."""
    return {"args": [encode(one) for one in json.loads(test.args)], "kwargs": {"dict": []}}


def gives(answer: str, expected: Any) -> bool:
    """Whether an answer, a line that a program wrote, is ``expected``.

    Compared as by ``==``: 1 equals 1.0 and True, and a list does not equal a tuple.
    """
    return _matches(_equals, answer, expected)


def gives_json(answer: str, expected: Any) -> bool:
    """Whether an answer is ``expected`` once both are JSON: tuples are lists, keys are texts."""
    return _matches(_equals_json, answer, expected)


def _matches(equals: Callable[[Any, Any], bool], answer: str, expected: Any) -> bool:
    """The answer is hostile: anything may be in it, and nothing may be raised."""
    try:
        return equals(json.loads(answer)["value"], expected)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return False


def _equals(coded: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        inner = _inner(coded, ("list",) if isinstance(expected, list) else ("tuple",))
        if inner is None or len(inner) != len(expected):
            return False
        return all(_equals(one, other) for one, other in zip(inner, expected, strict=True))
    return _equals_scalar(coded, expected)


def _equals_json(coded: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        inner = _inner(coded, ("list", "tuple"))
        if inner is None or len(inner) != len(expected):
            return False
        return all(_equals_json(one, other) for one, other in zip(inner, expected, strict=True))
    if isinstance(expected, dict):
        pairs = _inner(coded, ("dict",))
        if pairs is None or len(pairs) != len(expected):
            return False
        keys = [key if isinstance(key, str) else json.dumps(key) for key, _ in pairs]
        return all(
            key in expected and _equals_json(one, expected[key])
            for key, (_, one) in zip(keys, pairs, strict=True)
        )
    return _equals_scalar(coded, expected)


def _inner(coded: Any, kinds: tuple[str, ...]) -> list[Any] | None:
    if not isinstance(coded, dict) or len(coded) != 1:
        return None
    ((kind, inner),) = coded.items()
    return inner if kind in kinds and isinstance(inner, list) else None


def _equals_scalar(coded: Any, expected: Any) -> bool:
    if isinstance(coded, dict) and coded.keys() == {"numpy"}:
        _, coded = coded["numpy"]  # A number of numpy; the values of an array are a list.
    if isinstance(coded, dict) and coded.keys() <= NUMBERS:
        # Plain integers in JSON have at most 4,300 digits; a fraction of longer ones takes long.
        if not all(isinstance(one, int) for one in coded.get("Fraction", ())):
            return False
        return bool(decode(coded) == expected)
    return (coded is None or isinstance(coded, SCALARS)) and bool(coded == expected)
