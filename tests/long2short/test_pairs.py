"""Which answers are chosen and rejected, against the rule read off word by word."""

from hypothesis import given
from hypothesis import strategies as st

from kimi_core.evaluation.record import Answer
from kimi_core.long2short.pairs import preference_pairs, shortest_right


def answer(tokens, reward, text="x"):
    return Answer(text=text, tokens=tokens, end="stop", reward=reward)


def test_an_example():
    best, twin = answer(10, 1.0, "best"), answer(10, 1.0, "twin")
    longer, long = answer(14, 1.0), answer(15, 1.0)
    short_wrong, same_wrong, long_wrong = answer(3, 0.0), answer(10, 0.0), answer(11, 0.0)
    unjudged, empty = answer(40, None), answer(40, 0.0, "")
    found = preference_pairs(
        [longer, best, twin, long, short_wrong, same_wrong, long_wrong, unjudged, empty]
    )
    assert found == [(best, long), (best, long_wrong)]


def test_without_a_right_answer_there_is_nothing():
    assert preference_pairs([answer(3, 0.0), answer(9, 0.4), answer(5, None)]) == []
    assert shortest_right([answer(3, 0.0), answer(2, 1.0, "")]) is None
    assert shortest_right([]) is None


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([None, 0.0, 1.0])), max_size=8))
def test_every_pair_and_no_other(drawn):
    answers = [answer(tokens, reward, str(row)) for row, (tokens, reward) in enumerate(drawn)]
    right = [one for one in answers if one.reward == 1]
    if not right:
        assert preference_pairs(answers) == []
        return
    chosen = sorted(right, key=lambda one: one.tokens)[0]
    assert shortest_right(answers) == chosen
    rejected = [
        one
        for one in answers
        if (one.reward == 0 and one.tokens > chosen.tokens)
        or (one.reward == 1 and 2 * one.tokens >= 3 * chosen.tokens)
    ]
    assert preference_pairs(answers) == [(chosen, one) for one in rejected]
