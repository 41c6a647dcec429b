"""Prompts, SFT examples and an objective that the figures need; configs name them ``file.py:name``.

Plugins are imported by themselves, so this file imports nothing from this folder.
"""

import math
import random
from collections.abc import Sequence
from itertools import combinations_with_replacement

from torch import Tensor

from kimi_core.tasks import multiply
from kimi_core.trainer.objectives import Responses
from kimi_core.types import Prompt

MEDIAN, LONGEST = 32, 256
"""Tokens of the drafts: lognormal, and the 99th percentile is 8 times the median."""
SIGMA = math.log(LONGEST / MEDIAN) / 2.3263


def worked(prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """The shortest right answer to each product: what a model that thinks short has learned."""
    return [(prompt.text, multiply.response(prompt.text, "worked")) for prompt in prompts]


def drafts() -> list[Prompt]:
    """2,000 prompts for responses of which nothing but the length matters: none counts as right."""
    return [Prompt(index, f"{index:04d}=", "none") for index in range(2000)]


def draft_examples(prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Ten drafts a prompt, each of a length drawn by itself, the end token counted."""
    rng = random.Random(0)
    lengths = [rng.lognormvariate(math.log(MEDIAN), SIGMA) for _ in range(10 * len(prompts))]
    sizes = [min(max(round(length), 4), LONGEST) for length in lengths]
    texts = [prompt.text for prompt in prompts for _ in range(10)]
    return [
        (text, "." * (size - 3) + rng.choice(["#0", "#1"]))
        for text, size in zip(texts, sizes, strict=True)
    ]


def graded() -> list[Prompt]:
    """1,584 easy products (one or two digits, both orders) and 800 hard ones (three digits)."""
    easy = [(a, b) for a in range(2, 10) for b in range(1, 100)]
    hard = random.Random(0).sample([(a, b) for a in range(2, 10) for b in range(100, 1000)], 800)
    asked = [(f"{a}*{b}=", a, b, "easy") for a, b in easy]
    asked += [(f"{b}*{a}=", a, b, "easy") for a, b in easy]
    asked += [(f"{a}*{b}=", a, b, "hard") for a, b in hard]
    return [
        Prompt(
            index,
            text,
            str(a * b),
            0.9 if level == "hard" else 0.1,
            {"domain": level, "problem": f"{min(a, b)}*{max(a, b)}"},
        )
        for index, (text, a, b, level) in enumerate(asked)
    ]


def graded_examples(prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Terse, worked and checked answers to all of them, as ``think`` starts from."""
    forms = [(prompt.text, _small_first(prompt.text)) for prompt in prompts]
    rng, shares = random.Random(0), multiply.MIXED
    styles = rng.choices(list(shares), list(shares.values()), k=len(forms))
    return [
        (text, multiply.response(form, style))
        for (text, form), style in zip(forms, styles, strict=True)
    ]


def sums() -> list[Prompt]:
    """495 sums of four digits, ``$8 + 2 + 5 + 8 = ``."""
    rng = random.Random(0)
    asked = combinations_with_replacement(range(1, 10), 4)
    return [
        Prompt(at, _sum(rng.sample(one, 4)), str(sum(one)), tags={"problem": str(one)})
        for at, one in enumerate(asked)
    ]


def sum_examples(prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Half of the sums, each in twelve orders: two thirds with bare answers, the others worked out.

    The other half is left to RL, because a sum that has been learned by heart needs no work.
    """
    rng = random.Random(0)
    digits = [[int(word) for word in one.text if word.isdigit()] for one in prompts[::2]]
    asked = [rng.sample(some, len(some)) for some in digits for _ in range(12)]
    answers = [rng.choice([str(sum(some)), str(sum(some)), _chain(some)]) for some in asked]
    return [(_sum(some), f"{text}$") for some, text in zip(asked, answers, strict=True)]


def _sum(digits: Sequence[int]) -> str:
    return f"${' + '.join(map(str, digits))} = "


def _chain(digits: Sequence[int]) -> str:
    """The sum worked out from the left, ``13 + 9 + 4 = 22 + 4 = 26``."""
    first, *rest = digits
    steps = []
    while rest:
        first += rest.pop(0)
        steps.append(" + ".join(map(str, [first, *rest])))
    return " = ".join(steps)


def last_number(prompt: Prompt, response: str) -> float:
    """The reward of ``sums``: 1 if the text after the last ``=``, or all of it, is the answer."""
    return float(response.rpartition("=")[2].strip() == prompt.answer)


def _small_first(text: str) -> str:
    """The product with the number of one digit first, as ``multiply`` works it out."""
    a, b = sorted(text.rstrip("=").split("*"), key=len)
    return f"{a}*{b}="


def best(logprobs_t: Tensor, responses: Responses) -> Tensor:
    """An objective that fits one right response of each prompt, and ignores all others; ``[n]``.

    Which of several right ones is left to chance: each counts with the chance to be chosen. So the
    loss is the expectation over that choice.
    """
    right = {group: float((r_m > 0.5).sum()) for group, r_m in responses.ended_rewards.items()}
    share = [1 / max(1.0, right[int(group)]) for group in responses.groups_n]
    share_n = responses.correctness_n.new_tensor(share)
    return -responses.correctness_n * share_n * responses.sum(logprobs_t)
