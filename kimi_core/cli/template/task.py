"""The task: how often is a letter in a word? Change it to what you want to be learned.

    prompt    abacada:a
    guess     #4
    worked    a1b1a2c2a3d3a4#4

The model starts from random weights. The examples show it both ways to answer, and do not say which
one is better. Rewards do: who counts along is mostly right, and who guesses is mostly wrong.
"""

import random

from kimi_core import Prompt


def prompts() -> list[Prompt]:
    """What is asked, with the right answers. Some are kept for the test (prompts.held_out)."""
    rng = random.Random(0)
    asked: dict[str, int] = {}
    while len(asked) < 1000:
        word = "".join(rng.choices("abcd", k=rng.randint(5, 9)))
        letter = rng.choice("abcd")
        asked[f"{word}:{letter}"] = word.count(letter)
    return [Prompt(id, text, str(answer)) for id, (text, answer) in enumerate(asked.items())]


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """What the model imitates first: three guesses for two answers that are worked out."""
    rng = random.Random(0)
    ways = ["guess", "guess", "guess", "work", "work"]
    return [(prompt.text, respond(prompt, rng.choice(ways))) for prompt in prompts]


def respond(prompt: Prompt, way: str) -> str:
    """One right answer in one way."""
    if way == "guess":
        return f"#{prompt.answer}"
    word, letter = prompt.text.split(":")
    steps = (f"{one}{word[: at + 1].count(letter)}" for at, one in enumerate(word))
    return "".join(steps) + f"#{prompt.answer}"
