"""Which of the answers to one prompt teach brevity (section 2.4)."""

from collections.abc import Sequence

from kimi_core.evaluation.record import Answer

LONGER = 1.5
"""A right answer is rejected if it is at least this many times as long as the shortest one."""


def shortest_right(answers: Sequence[Answer]) -> Answer | None:
    """The shortest right answer, the first of several; None: no answer is right."""
    right = [one for one in answers if is_right(one)]
    return min(right, key=lambda one: one.tokens, default=None)


def preference_pairs(answers: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Pairs of a chosen and a rejected answer for DPO; none if no answer is right.

    Chosen is the shortest right answer. Each longer one is rejected that is wrong, or right and at
    least ``LONGER`` times as long. Answers without a verdict are left out.
    """
    chosen = shortest_right(answers)
    if chosen is None:
        return []
    return [
        (chosen, one)
        for one in answers
        if one.reward is not None
        and one.text
        and one.tokens > chosen.tokens
        and (not is_right(one) or one.tokens >= LONGER * chosen.tokens)
    ]


def is_right(answer: Answer) -> bool:
    """Whether an answer is right, as for the length reward; one without text never is."""
    return bool(answer.text) and answer.is_right
