"""The filter before the search for overlaps misses nothing."""

from hypothesis import given
from hypothesis import strategies as st

from kimi_core.prompts import candidates
from kimi_core.prompts.candidates import Filter
from kimi_core.prompts.overlap import PUNCTUATION, QUOTED_WORDS, Quotes, normalized

words = st.sampled_from([*"abc", "dog's", "(A", "b),", "3", "+", "x.y", "İ", "é", "ﬁ", "１2", "?!"])
gaps = st.sampled_from([" ", "  ", "\n", "\t", "\x1f", "\x00", "\u2003", ". "])
texts = st.lists(st.tuples(words, gaps), max_size=24).map(lambda some: "".join(sum(some, ())))


@given(st.lists(texts, max_size=4), st.lists(texts, min_size=1, max_size=12), st.integers(1, 8))
def test_every_text_that_is_or_contains_another_is_a_candidate(wanted, others, block):
    before, candidates.BLOCK = candidates.BLOCK, block
    try:
        others = [*others, *wanted, *(f"a b {one} c" for one in wanted)]
        held = {normalized(text) for text in wanted}
        found = list(Filter(held, QUOTED_WORDS, PUNCTUATION).candidates(others))
    finally:
        candidates.BLOCK = before
    quotes = Quotes(held)
    matching = [
        text for text in others if normalized(text) in held or quotes.inside(normalized(text))
    ]
    left = iter(found)
    assert all(text in left for text in matching)  # In order, with none missing.


def test_hardly_any_other_text_is_a_candidate():
    texts = [f"How many are left of {i} boxes if {i * 7} of them are sold?" for i in range(3000)]
    wanted = {normalized(text) for text in texts[::100]}
    found = list(Filter(wanted, QUOTED_WORDS, PUNCTUATION).candidates(texts))
    assert len(texts[::100]) <= len(found) < 60
    assert set(texts[::100]) <= set(found)
