"""Judging answers without running the check gives what running it gives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.reward.code.check_driver import decode, encode
from kimi_core.reward.code.literals import gives, literal_cases
from kimi_core.reward.code.problem import CheckTest

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.sampled_from(["", "1", "é"])
)
listed = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
)
plain = st.recursive(
    scalars | st.complex_numbers() | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(scalars, max_size=3)
        | st.frozensets(scalars, max_size=3)
        | st.dictionaries(scalars, inner, max_size=3)
    ),
)


def same(a, b) -> bool:
    """``==``, where NaN equals itself, and types are told apart."""
    return told(a) == told(b) or a == b


def told(value) -> str:
    """``repr``, in which the elements of a set have an order: that of NaN is its address."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({sorted(map(told, value))})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({[told(one) for one in value]})"
    if isinstance(value, dict):
        return f"dict({[(told(key), told(one)) for key, one in value.items()]})"
    return repr(value)


@given(plain)
def test_plain_data_survives_the_border(value):
    there = json.loads(json.dumps(encode(value)))
    assert type(decode(there)) is type(value)
    assert same(decode(there), value)


@given(plain, listed)
def test_gives_is_equality(value, expected):
    assert gives(json.dumps({"value": encode(value)}), expected) is bool(
        decode(encode(value)) == expected
    )


@given(listed)
def test_every_value_gives_itself(value):
    found = gives(json.dumps({"value": encode(value)}), value)
    assert found is ("nan" not in repr(value))  # NaN differs from itself, as in Python


@given(st.text() | st.recursive(scalars, st.lists).map(json.dumps))
def test_no_line_of_a_program_is_too_much(line):
    assert gives(line, [1, "x", (2.0,)]) is False


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"value": ' + "9" * 10_000 + "}", '{"value": NaN}', '{"raised": "x"}']
)
def test_hostile_lines(line):
    assert gives(line, 1) is False


@pytest.mark.parametrize(
    ("source", "cases"),
    [
        ("assert f(1) == 2", [([1], {}, 2)]),
        ("assert candidate(-1.5, 'a') == None, 'why'", [([-1.5, "a"], {}, None)]),
        ("assert f([1], n=(2,)) == [(3,)]\nassert f() == ''",
         [([[1]], {"n": (2,)}, [(3,)]), ([], {}, "")]),
        ("METADATA = {'a': 1}\n"
         "def check(g):\n    'why'\n    assert True\n    assert g({1}) == 2\n"
         "    assert f(3) == 4", [([{1}], {}, 2), ([3], {}, 4)]),
    ],
)  # fmt: skip
def test_cases_are_found(source, cases):
    found = literal_cases(CheckTest(source, "f"))
    assert found is not None
    readable = [
        ([decode(one) for one in call["args"]], decode(call["kwargs"]), expected)
        for call, expected in found
    ]
    assert readable == cases


@pytest.mark.parametrize(
    "source",
    [
        "",
        "assert True",
        "assert f(1) == ",
        "assert f(1)",
        "assert f(1) != 2",
        "assert 1 < f(1) == 2",
        "assert f(1) == 2 == f(2)",
        "assert f(x) == 2",
        "assert f(*[1]) == 2",
        "assert f(**{'a': 1}) == 2",
        "assert f(1) == f(1)",
        "assert g(1) == 2",
        "assert f(1) == {2}",
        "assert f(1) == [{2: 3}]",
        "assert abs(f(1) - 2) < 1",
        "x = 1\nassert f(1) == 2",
        "for x in range(3):\n    assert f(1) == 2",
        "assert f(1) == 2\ndef check(g): assert g(1) == 2",
        "def check(g): assert g(1) == 2\ndef check_again(g): assert g(1) == 2",
        "def test(g): assert g(1) == 2",
        "async def check(g): assert g(1) == 2",
    ],
)
def test_anything_else_is_left_to_the_check_itself(source):
    assert literal_cases(CheckTest(source, "f")) is None
