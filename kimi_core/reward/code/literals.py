"""Checks that only compare calls with literals. Their answers can be judged without running them.

Most checks consist only of ``assert f(1, 2) == [3]``. Calls and expected values are then in the
source, so one sandbox suffices: the answers are compared here, as plain data.
"""

import ast
import json
from functools import lru_cache
from typing import Any

from kimi_core.reward.code.check_driver import encode
from kimi_core.reward.code.problem import CheckTest

Case = tuple[dict[str, Any], Any]
"""A call as ``check_driver`` takes it, and its expected value."""

SCALARS = (bool, int, float, str)


@lru_cache(maxsize=65536)
def literal_cases(test: CheckTest) -> tuple[Case, ...] | None:
    """The calls of a check and their expected values; None if the check does anything else.

    Expected values with sets or dicts are left to the check itself. To build sets here from the
    output of a program would let the program choose how long that takes.

    >>> literal_cases(CheckTest("assert f(1, n=[2]) == (3,)", "f"))
    (({'args': [1], 'kwargs': {'dict': [['n', {'list': [2]}]]}}, (3,)),)
    """
    try:
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


def gives(answer: str, expected: Any) -> bool:
    """Whether an answer, a line that a program wrote, is ``expected``.

    Compared as by ``==``: 1 equals 1.0 and True, and a list does not equal a tuple.
    """
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "value" in found and _equals(found["value"], expected)


def _equals(coded: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        kind = "list" if isinstance(expected, list) else "tuple"
        inner = coded.get(kind) if isinstance(coded, dict) and len(coded) == 1 else None
        if not isinstance(inner, list) or len(inner) != len(expected):
            return False
        return all(_equals(one, other) for one, other in zip(inner, expected, strict=True))
    return (coded is None or isinstance(coded, SCALARS)) and bool(coded == expected)
