"""The program that runs inside the sandbox for assert-style tests; standard library only.

A check is split in two, and no sandbox ever holds both halves:

* ``candidate`` runs the response's program and makes the calls that it is given. It knows the
  arguments, but not the expected values.
* ``judge`` runs the test code. The values from the other sandbox answer its calls of the function
  under test. It knows the expected values, but holds no line of the response.

Only plain data goes from one to the other: values of builtin types, and of the few types of the
standard library and of numpy in ``coded_other``. So the response cannot make an object whose
``__eq__`` agrees with everything. An iterator is written out, up to ``ITEMS`` items.

The judge finds the calls by running the test code. When it has no answer for a call, it continues
with a placeholder and lets failing asserts pass, to find as many further calls as it can. Then it
asks for their answers. One round suffices unless calls depend on answers.

The input is one JSON object on standard input:

    {"mode": "candidate", "program", "entry_point", "calls", "prelude"}    → an answer a line
    {"mode": "judge", "setup", "check", "entry_point", "calls", "answers"} → {"verdict", "calls",
                                                                              "fault"}

A call is ``{"args", "kwargs"}``, an answer ``{"value"}`` or ``{"raised", "message"}``, a verdict
``pass``, ``fail``, ``calls`` (these need answers first) or ``broken`` (the test code itself is).
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

PLAIN: Any = (bool, int, float, str)

BIG = 1 << 10_000
"""Larger integers are written in base 16, because Python limits decimal digits to 4,300."""

ITEMS = 10_000
"""Items of an iterator that are handed on; an iterator without end would take for ever."""

CONTROL_FLOW = ("StopIteration", "StopAsyncIteration")
"""Exceptions that end a loop of the test code instead of its test."""

TOLERANT = "try: pass\nexcept Exception:\n    if not __recording__(): raise"
"""Wrapper of each assert of the test code, so that the assert cannot end a recording."""


def encode(value: Any) -> Any:
    """A JSON form of plain data that keeps lists, tuples, sets and the types of keys apart.

    Raises:
        TypeError: the value is not plain data, or contains something that is not.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < BIG else {"int": hex(value)}
    if isinstance(value, (float, str)):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    return coded_other(value)


def coded_other(value: Any) -> Any:
    """``encode`` for what functions return less often."""
    import collections
    import datetime
    import decimal
    import fractions
    from itertools import islice

    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, collections.deque):
        return {"deque": [[encode(one) for one in value], value.maxlen]}
    for name in ("keys", "values", "items"):
        if isinstance(value, type(getattr({}, name)())):
            return {name: [encode(one) for one in value]}
    if isinstance(value, decimal.Decimal):
        return {"Decimal": str(value)}
    if isinstance(value, fractions.Fraction):
        return {"Fraction": [encode(value.numerator), encode(value.denominator)]}
    for kind in (datetime.datetime, datetime.date, datetime.time):
        if isinstance(value, kind):
            return {kind.__name__: value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if type(value).__module__ == "numpy":
        if hasattr(value, "dtype") and value.dtype.kind in "biufcUS":
            return {"numpy": [value.dtype.str, encode(value.tolist())]}
    elif isinstance(value, collections.abc.Iterator):
        return {"iterator": [encode(one) for one in islice(value, ITEMS)]}
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(coded: Any) -> Any:
    """The value that ``encode`` was given. Raises ValueError or TypeError for any other input."""
    if coded is None or isinstance(coded, PLAIN):
        return coded
    if not isinstance(coded, dict) or len(coded) != 1:
        raise ValueError(f"{coded!r:.80} encodes nothing")
    ((kind, inner),) = coded.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "complex":
        return complex(*inner)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {decode(key): decode(one) for key, one in inner}
    made: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}.get(kind)
    return made(decode(one) for one in inner) if made else decoded_other(kind, inner)


def decoded_other(kind: str, inner: Any) -> Any:
    """``decode`` for what ``coded_other`` wrote. Raises KeyError for any other kind."""
    import collections
    import datetime
    import decimal
    import fractions

    if kind == "deque":
        return collections.deque(map(decode, inner[0]), inner[1])
    if kind == "numpy":
        import numpy

        dtype, values = numpy.dtype(inner[0]), decode(inner[1])
        return numpy.array(values, dtype) if isinstance(values, list) else dtype.type(values)
    if kind in ("datetime", "date", "time"):
        return getattr(datetime, kind).fromisoformat(inner)
    makers: dict[str, Any] = {
        "range": lambda: range(*inner),
        "keys": lambda: dict.fromkeys(map(decode, inner)).keys(),
        "values": lambda: dict(enumerate(map(decode, inner))).values(),
        "items": lambda: dict(map(decode, inner)).items(),
        "Decimal": lambda: decimal.Decimal(inner),
        "Fraction": lambda: fractions.Fraction(*map(decode, inner)),
        "timedelta": lambda: datetime.timedelta(*inner),
        "iterator": lambda: (decode(one) for one in inner),
    }
    return makers[kind]()


def answer(function: Callable[..., Any], call: dict[str, Any]) -> str:
    """Make one call and return its value or exception as a line of JSON."""
    try:
        value = function(*map(decode, call["args"]), **dict(decode(call["kwargs"])))
        return json.dumps({"value": encode(value)})
    except Exception as error:  # noqa: BLE001 - the response's code may raise anything
        return json.dumps({"raised": type(error).__name__, "message": str(error)[:200]})


def run_candidate(given: dict[str, Any], out: TextIO) -> None:
    """Run the program, then make the calls, with a line of output for each."""
    space: dict[str, Any] = {"__name__": "solution"}
    exec(given["prelude"], space)
    exec(compile(given["program"], "program.py", "exec"), space)
    function = find(space, given["entry_point"])
    for call in given["calls"]:
        print(answer(function, call), file=out, flush=True)


def find(space: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function, otherwise the method of ``class Solution``, called on a fresh instance."""
    solution = space.get("Solution")
    if name not in space and isinstance(solution, type) and hasattr(solution, name):
        return lambda *args, **kwargs: getattr(solution(), name)(*args, **kwargs)
    function: Callable[..., Any] = space[name]
    return function


class Unknown:
    """Placeholder of an unknown answer. It is empty, so that ``tuple(f(x))`` works."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Judge:
    """Plays the function under test: gives known answers, and notes the other calls."""

    def __init__(self, calls: list[Any], answers: list[str]) -> None:
        self.known = list(zip(calls, answers, strict=False))
        self.calls: list[Any] = []
        self.recording = False
        self.broken = ""
        self.last_raised = False
        """Whether the newest answer was an exception."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            call = {"args": [encode(one) for one in args], "kwargs": encode(kwargs)}
        except TypeError as error:
            if not self.recording:
                self.broken = f"an argument of the function under test: {error}"
            raise
        position = len(self.calls)
        self.calls.append(call)
        if self.recording or position >= len(self.known) or self.known[position][0] != call:
            self.recording = True
            return Unknown()
        self.last_raised = True
        value = read_answer(self.known[position][1])
        self.last_raised = False
        return value

    def stopped_early(self) -> str:
        """How an exception of the response ended the calls before the last one, or ''."""
        if self.recording or not self.last_raised or len(self.calls) >= len(self.known):
            return ""
        return f"an exception ended the test after {len(self.calls)} of {len(self.known)} calls"


def read_answer(line: str) -> Any:
    """The value in a line that the response's program wrote; raises the exception in it.

    An exception in ``CONTROL_FLOW`` becomes a RuntimeError, as in a generator (PEP 479). Otherwise
    ``all(map(f, cases))`` would pass at the first case.
    """
    try:
        found = json.loads(line)
        if "value" in found:
            return decode(found["value"])
        kind, message = found["raised"], found["message"]
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise RuntimeError(f"unreadable answer: {line!r:.80}") from error
    made = getattr(builtins, str(kind), None)
    if isinstance(made, type) and issubclass(made, Exception) and kind not in CONTROL_FLOW:
        raise made(message)
    raise RuntimeError(f"{found['raised']}: {message}")


def tolerant(source: str) -> Any:
    """The test code with each assert wrapped in ``TOLERANT``, compiled.

    An assert is the statement, or a call as ``self.assertEqual(…)`` or ``np.testing.assert_equal``.
    """
    import ast  # Here, because the other half starts sooner without it.

    def wrap(node: ast.stmt) -> ast.stmt:
        wrapped = ast.parse(TOLERANT).body[0]
        assert isinstance(wrapped, ast.Try)
        wrapped.body = [node]
        return wrapped

    class Wrap(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> ast.stmt:
            node.msg = None  # Some messages make calls, too.
            return wrap(node)

        def visit_Expr(self, node: ast.Expr) -> ast.stmt:
            called = getattr(node.value, "func", None)
            is_assert = isinstance(called, ast.Attribute) and called.attr.startswith("assert")
            return wrap(node) if is_assert else node

    return compile(ast.fix_missing_locations(Wrap().visit(ast.parse(source))), "check.py", "exec")


def run_tests(space: dict[str, Any]) -> None:
    """Call what pytest and unittest would find: functions ``test…``, and test cases."""
    for name, one in list(space.items()):
        if name.startswith("test") and callable(one) and not isinstance(one, type):
            one()
    unittest = sys.modules.get("unittest")
    classes = [one for one in space.values() if isinstance(one, type)]
    if unittest and any(issubclass(one, unittest.TestCase) for one in classes):
        unittest.main(argv=["check"])  # Ends with an exit status.


def run_judge(given: dict[str, Any], out: TextIO) -> None:
    """Run the test code with the known answers and report."""
    import random

    random.seed(0)  # A test that draws its cases draws the same ones in every round.
    judge = Judge(given["calls"], given["answers"])
    # The test code is the main program, as `unittest.main()` expects it.
    sys.modules["__main__"] = module = type(sys)("__main__")
    space = module.__dict__
    space["__recording__"] = lambda: judge.recording
    exec(compile(given["setup"], "setup.py", "exec"), space)
    space[given["entry_point"]] = space["candidate"] = judge
    sys.modules["solution"] = solution = type(sys)("solution")
    setattr(solution, given["entry_point"], judge)
    code = tolerant(given["check"])
    fault = ""
    try:
        exec(code, space)
        if "check" in space:
            space["check"](judge)
        elif not judge.calls:
            run_tests(space)
    except SystemExit as ended:  # `unittest.main()` ends so, as many scripts do.
        fault = f"exit status {ended.code}" if ended.code else ""
    except Exception as error:  # noqa: BLE001 - whatever the answers made of the test code
        fault = f"{type(error).__name__}: {error}"[:300]
    fault = fault or judge.stopped_early()
    verdict = "calls" if judge.recording else "fail" if fault else "pass"
    if judge.broken or not judge.calls:
        verdict, fault = "broken", judge.broken or fault or "it never calls the function under test"
    print(json.dumps({"verdict": verdict, "calls": judge.calls, "fault": fault}), file=out)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    received = json.load(sys.stdin)
    # Output of the code under test goes to standard error, so that it is no answer.
    with os.fdopen(os.dup(1), "w") as own_output:
        os.dup2(2, 1)
        {"candidate": run_candidate, "judge": run_judge}[received["mode"]](received, own_output)
