"""The task: add up digits, and keep the last digit of the sum. Change it to one of yours.

    prompt    38142=
    guess     #8
    worked    3,1,2,6,8#8

The model starts from random weights. The examples show it both ways to answer, and do not say which
one is better. Rewards do: who adds step by step is mostly right, and who guesses is mostly wrong.
"""

import random
from itertools import accumulate

from kimi_core import Prompt


def prompts() -> list[Prompt]:
    """What is asked, with the right answers. Some are kept for the test (prompts.held_out)."""
    rng = random.Random(0)
    asked = sorted({"".join(rng.choices("0123456789", k=rng.randint(4, 7))) for _ in range(2000)})
    return [Prompt(row, f"{digits}=", sums(digits)[-1]) for row, digits in enumerate(asked)]


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """What the model imitates first: three guesses for two answers that are worked out."""
    rng = random.Random(0)
    ways = ["guess", "guess", "guess", "work", "work"]
    return [(prompt.text, respond(prompt, rng.choice(ways))) for prompt in prompts]


def respond(prompt: Prompt, way: str) -> str:
    """The right answer in one way."""
    steps = ",".join(sums(prompt.text.rstrip("="))) if way == "work" else ""
    return f"{steps}#{prompt.answer}"


def sums(digits: str) -> list[str]:
    """The last digits of the sums so far."""
    return [str(total % 10) for total in accumulate(map(int, digits))]
