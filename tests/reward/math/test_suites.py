"""Agreement with the test suites of other graders, and answers of every shape."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from kimi_core.config import MathConfig
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt

pytest.importorskip("math_verify", reason="math-verify is not installed: kimi-core[math]")

DATA = Path(__file__).parents[1] / "data" / "math_suites.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
"""Pairs of public suites: the verdict that the suite expects, and math-verify's."""


@pytest.fixture(scope="module")
def reward():
    made = MathReward(MathConfig())
    yield made
    made.close()


def test_every_suite_agrees_at_least_as_often_as_with_math_verify(reward):
    ours, theirs = Counter(), Counter()
    for row in ROWS:
        key = row["suite"], row["form"]
        found = reward(Prompt(0, "", row["reference"]), row["response"])
        ours[key] += found == row["expected"]
        theirs[key] += row["math_verify"] == row["expected"]
    behind = {key: (ours[key], theirs[key]) for key in theirs if ours[key] < theirs[key]}
    assert not behind


REFERENCES = [
    "42", "-7", "1/3", "0.25", "10^{-3}", r"\frac{2}{7}", r"\sqrt{3}", r"2\pi", "x+1", "x^2-1",
    r"\frac{x}{y}", "(1, 2)", "[0, 1)", r"\{1, 2, 3\}", "x = 5", "x=1, y=2", "x > 3", "y = 2x+1",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "3+4i", "B", "AB", "Paris", r"5\text{ cm}", r"50\%",
    r"90^\circ", "f(2)=5", r"(-\infty, 3)\cup[4, 5)", "even", r"2\text{ hours }5\text{ minutes}",
]  # fmt: skip
PIECES = [
    *"0123456789+-*/^=<>!,;:.()[]{}$%&_|~'xyniIeE ", r"\frac", r"\sqrt", r"\text{", "}", r"\pi",
    r"\pm", r"\infty", r"\le", r"\cup", r"\int", r"\sum", r"\lim", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\\", r"\boxed{", "True", "False", "None", "nan", "zoo",
    "and", "or", "is", "answer", "sqrt(", "exp(",
    r"\overline{", r"\binom", r"\{", r"\}", "°", "²", "×", "№", "\u202e", "\n",
]  # fmt: skip
UNIVERSAL = [
    "", "0=0", "1=1", "x=x", "True", "i<0", r"\emptyset", r"\mathbb{R}", r"(-\infty,\infty)", "nan",
    "x", "i", r"\infty", r"\text{any}", "*", "42 or x", "[0, 42]", r"\pm 42", "1/0", "0/0",
]  # fmt: skip


def test_no_form_of_response_lacks_a_verdict(reward):
    rng = random.Random(0)
    for number in range(600):
        reference = REFERENCES[number % len(REFERENCES)]
        answer = "".join(rng.choices(PIECES, k=rng.randrange(1, 16)))
        form = ["\\boxed{%s}", "Answer: %s", "The answer is $%s$.", "%s"][number % 4]
        assert reward(Prompt(0, "", reference), form % answer) in (0.0, 1.0)


@pytest.mark.nightly
def test_no_answer_is_right_for_many_references(reward):
    rng = random.Random(1)
    answers = UNIVERSAL + ["".join(rng.choices(PIECES, k=6)) for _ in range(20)]
    for answer in answers:
        accepted = [r for r in REFERENCES if reward.equal(r, answer)]
        assert len(accepted) <= 1, (answer, accepted)
