"""How often is a letter in a word? Minutes on two cores:

    python docs/examples/count_letters.py

    prompt    abacada:a
    guess     #4
    worked    a1b1a2c2a3d3a4#4

The examples show both ways to answer, and rewards decide which one the model keeps.
"""

import random
import sys

from kimi_core import Config, Prompt, train

RUN = {
    "name": "count-letters",
    "iterations": 25,
    "model": {"scratch": {"layers": 2, "width": 64, "context": 64}},
    "prompts": {"held_out": 100},
    "sft": {"steps": 600},
    "rollout": {"prompts_per_iteration": 32, "max_response_tokens": 32},
    "trainer": {"learning_rate": 1e-4},
    "evaluation": {"every": 5},
}


def prompts() -> list[Prompt]:
    rng = random.Random(0)
    asked: dict[str, int] = {}
    while len(asked) < 1000:
        word = "".join(rng.choices("abcd", k=rng.randint(5, 9)))
        letter = rng.choice("abcd")
        asked[f"{word}:{letter}"] = word.count(letter)
    return [Prompt(row, text, str(n)) for row, (text, n) in enumerate(asked.items())]


def reward(prompt: Prompt, response: str) -> float:
    return float(response.rpartition("#")[2] == prompt.answer)


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [(p.text, worked(p) if rng.random() < 0.4 else f"#{p.answer}") for p in prompts]


def worked(prompt: Prompt) -> str:
    word, letter = prompt.text.split(":")
    steps = (f"{one}{word[: at + 1].count(letter)}" for at, one in enumerate(word))
    return "".join(steps) + f"#{prompt.answer}"


if __name__ == "__main__":
    config = Config.model_validate(RUN | {"seed": int([*sys.argv, "0"][1])})
    print(train(config, prompts=prompts, reward=reward, examples=examples))
