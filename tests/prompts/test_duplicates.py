"""Near-duplicates, against a comparison of all pairs, and leaked evaluation prompts."""

from hypothesis import given
from hypothesis import strategies as st

from kimi_core.prompts.duplicates import GRAM, NUMBER, Leaks, near_duplicates
from kimi_core.prompts.overlap import normalized

WORDS = ["tom", "has", "3", "4", "apples", "pears", "How many", "x", "?", "ate"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join), max_size=12)


def by_all_pairs(texts, threshold):
    """Slow twin."""

    def grams(text):
        return {text[at : at + GRAM] for at in range(max(len(text) - GRAM, 0) + 1)}

    def alike(one, other):
        one, other = normalized(one), normalized(other)
        union, both = grams(one) | grams(other), grams(one) & grams(other)
        same = NUMBER.findall(one) == NUMBER.findall(other)
        return same and len(both) >= threshold * len(union)

    rows = range(len(texts))
    return [next((o for o in rows[:row] if alike(texts[row], texts[o])), None) for row in rows]


@given(TEXTS, st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0]))
def test_as_the_comparison_of_all_pairs(texts, threshold):
    assert near_duplicates(texts, threshold) == by_all_pairs(texts, threshold)


def test_small_changes_are_found_and_other_numbers_are_not():
    text = "Tom has 3 apples and buys 5 more. How many apples does he have?"
    others = [
        text,
        "TOM has 3 apples, and buys 5 more.  How many apples does he have now?",
        text.replace("5", "6"),
        "Anna had 3 cookies and ate 5 of them. How many are left?",
    ]
    assert near_duplicates(others, 0.7) == [None, 0, None, None]
    assert near_duplicates([], 0.7) == [] and near_duplicates(["", " "], 0.7) == [None, 0]


def test_leaks():
    held = [
        "one two three four five 6 seven",
        "short one",
        "2 boxes hold 30 pens. How many in all?",
    ]
    leaks = Leaks(held, 4)
    assert leaks.inside("zero One two, three four! five 6 seven eight") == 0
    assert leaks.inside("one two three four five or 6 seven") == 0  # 2 of its 4 runs.
    assert leaks.inside("one two three four five or 7 seven") is None
    assert leaks.inside("three four five 6 seven") == 0
    assert leaks.inside("Short  one.") == 1 and leaks.inside("a short one more word") is None
    assert leaks.inside("Today 2 boxes hold 30 pens. How many in all?") == 2
    assert leaks.inside("Today 2 boxes hold 31 pens. How many in all?") is None
    assert Leaks([], 4).inside("anything at all") is None
