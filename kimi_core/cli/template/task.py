"""The task: which weekday is it n days later? Change it to what you want to be learned.

    prompt    Tue+23=
    guess     #Thu
    worked    23-21=2;Wed,Thu#Thu

The model starts from random weights. The examples show it both ways to answer, and do not say which
one is better. Rewards do: who works it out is mostly right, and who guesses is mostly wrong.
"""

import random

from kimi_core import Prompt

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]


def prompts() -> list[Prompt]:
    """What is asked, with the right answers. Some are kept for the test (prompts.held_out)."""
    asked = [(day, n) for day in range(7) for n in range(1, 100)]
    return [
        Prompt(id, f"{DAYS[day]}+{n}=", answer=DAYS[(day + n) % 7])
        for id, (day, n) in enumerate(asked)
    ]


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """What the model imitates first: three guesses for two answers that are worked out."""
    rng = random.Random(0)
    ways = [guess, guess, guess, worked, worked]
    return [(prompt.text, rng.choice(ways)(prompt)) for prompt in prompts]


def guess(prompt: Prompt) -> str:
    return f"#{prompt.answer}"


def worked(prompt: Prompt) -> str:
    day, _, number = prompt.text.rstrip("=").partition("+")
    first, n = DAYS.index(day), int(number)
    passed = [DAYS[(first + step) % 7] for step in range(1, n % 7 + 1)]
    return f"{n}-{n - n % 7}={n % 7};{','.join(passed)}#{prompt.answer}"
