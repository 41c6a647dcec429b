"""Where answers stand, and which are the same without any algebra."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.reward.math.answers import agree, clean
from kimi_core.reward.math.extract import LONGEST, extract

EVERYWHERE = ["boxed", "hashes", "answer", "last_line"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{7}, no: \boxed{8}.", "8"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a } brace}", r"\text{a } brace"),
        (r"\boxed{x = \boxed{4}}", "4"),
        (r"\boxed{\boxed{41} \boxed{42} 43}", "42"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"} \boxed{7} {", "7"),
        (r"\boxed{}", None),
        (r"\boxed{7", None),
        (r"\boxed 7", None),
        (r"\boxedx{7}", None),
        ("7", None),
    ],
)
def test_boxed(text, answer):
    assert extract(text, ["boxed"]) == answer


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        ("1 + 1 = 2\n#### 2", "hashes", "2"),
        ("#### 3\n#### 2\nDone.", "hashes", "2"),
        ("### 2", "hashes", None),
        ("Answer: 12", "answer", "12"),
        ("**Answer:** 12", "answer", "12"),
        ("The final answer is $x = 5$. I hope", "answer", "x = 5"),
        ("The answer is: 5", "answer", "5"),
        ("answer: 3\nNo, answer: 4", "answer", "4"),
        ("Answer: 4\nThat was the answer", "answer", "4"),
        ("I have no answer", "answer", None),
        ("We add.\n\n42\n\n", "last_line", "42"),
        ("So it is $3$ or rather $4$.", "last_line", "So it is $3$ or rather $4$."),
        ("It costs \\$5", "last_line", "\\$5"),
        ("", "last_line", None),
        (" \n ", "last_line", None),
    ],
)
def test_other_places(text, place, answer):
    assert extract(text, [place]) == answer


def test_the_first_place_that_is_there_counts():
    text = "Answer: 1\n#### 2\n\\boxed{3}\n4"
    assert extract(text, EVERYWHERE) == "3"
    assert extract(text, ["last_line", "boxed"]) == "4"
    assert extract("Answer: 1\n4", EVERYWHERE) == "1"
    assert extract("4", EVERYWHERE) == "4"
    assert extract(text, []) is None


balanced = st.recursive(
    st.text("ab1 +\\,", max_size=4).map(lambda text: text.replace("\\", r"\\")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
)


@given(st.text("abc \n$#", max_size=20), balanced, st.text("abc \n$#", max_size=20))
def test_what_is_boxed_comes_out_whole(before, inner, after):
    expected = inner.strip() or None
    assert extract(before + r"\boxed{" + inner + "}" + after, ["boxed"]) == expected


pieces = st.sampled_from([*"\\{}$#\n0aA: ", "\\boxed{", "answer", "####", "İ"])
hostile = st.lists(pieces, max_size=30).map("".join)


@given(hostile, hostile)
def test_any_text_is_taken(text, other):
    for place in EVERYWHERE:
        found = extract(text, [place])
        assert found is None or found == found.strip() != ""
    assert agree(clean(text), clean(text)) is True
    assert agree(clean(text), clean(other)) in (True, False, None)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 300_000,
        "{" * 2_000_000,
        "answer" * 300_000,
        "answer is " * 200_000,
        "$" * 2_000_001,
        "####" * 500_000,
        r"\boxed{" + "5" * 2_000_000 + "}",
        "9" * 2_000_000 + " " * 2_000_000 + "x",
        "1,234" + ",567" * 500_000,
    ],
    ids=lambda text: text[:12],
)
def test_megabytes_are_read_in_a_line(text):
    """Quadratic in any of these would take hours."""
    answer = extract(text, EVERYWHERE)
    assert agree("5", clean(answer or "")) in (False, None)


numbers = st.integers(-(10**12), 10**12)


@given(numbers)
def test_an_integer_in_its_many_forms(number):
    sign, digits = "-" * (number < 0), f"{abs(number)}"
    forms = [
        f"{number:,}",
        f"{number}.0",
        f"{number}.",
        f"${number}$",
        f"{sign}00{digits}",
        f"\\frac{{{number * 2}}}{{2}}",
        f"{number * 3}/3",
        f"{number} cm",
        f"{number:,}".replace(",", "{,}"),
        f"{number:,}".replace(",", r"\,"),
    ]
    for form in forms:
        assert agree(clean(str(number)), clean(form)) is True, form
        assert agree(clean(str(number + 1)), clean(form)) is False, form


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_fractions_are_exact(above, below, other):
    one = f"\\frac{{{above}}}{{{below}}}"
    same = Fraction(above, below) == Fraction(above, other)
    assert agree(one, f"{above}/{other}") is same


@given(st.integers(10**6, 10**7 - 1), st.integers(-12, 12), st.integers(-2, 2))
def test_decimals_agree_to_six_digits(digits, exponent, off):
    """In the last of seven digits they may differ by none, wherever the point is; below 1."""
    one = Fraction(digits, 10**7) * Fraction(10) ** min(exponent, 0)
    other = one * (1 + Fraction(off * 6, 10**7))
    texts = [f"{float(value):.15e}" for value in (one, other)]
    assert agree(*texts) is (abs(off) < 2)


@pytest.mark.parametrize(
    "answer",
    [
        "5 " + "a per " * 300 + "1",
        "5 " + "a " * 900 + "1",
        "1" + ",234" * 400 + "x1",
        "a-" * 900 + "1",
    ],
    ids=lambda answer: answer[:12],
)
def test_no_short_answer_takes_long(answer):
    """A pattern that backtracks would take ages on these."""
    for reference in ("5 cm", "word", "x"):
        assert agree(reference, clean(answer)) in (False, None)


def test_only_short_answers_are_looked_at_closely():
    assert agree("5", "5" + "0" * LONGEST) is False
    assert agree("5" * 2 * LONGEST, "5" * 2 * LONGEST) is True
