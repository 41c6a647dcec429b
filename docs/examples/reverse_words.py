"""Write a word backwards. Minutes on two cores:

    python docs/examples/reverse_words.py

    prompt    garden>
    copied    garden
    reversed  nedrag

Half of the examples are wrong: they copy the word. The model picks up both habits, and rewards
leave it the right one.
"""

import random
import sys

from kimi_core import Config, Prompt, train

RUN = {
    "name": "reverse-words",
    "iterations": 25,
    "model": {"scratch": {"layers": 2, "width": 64, "context": 32}},
    "prompts": {"held_out": 200},
    "sft": {"steps": 600},
    "rollout": {"prompts_per_iteration": 32, "max_response_tokens": 12},
    "trainer": {"learning_rate": 1e-4},
    "evaluation": {"every": 5},
}


def prompts() -> list[Prompt]:
    rng = random.Random(0)
    words = {"".join(rng.choices("aeioubdgklmnprst", k=rng.randint(4, 8))) for _ in range(4000)}
    return [Prompt(row, f"{word}>", word[::-1]) for row, word in enumerate(sorted(words))]


def reward(prompt: Prompt, response: str) -> float:
    return float(response == prompt.answer)


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [(p.text, rng.choice([p.answer, p.text.rstrip(">")])) for p in prompts]


if __name__ == "__main__":
    seed = int([*sys.argv, "0"][1])
    config = Config.model_validate(RUN | {"seed": seed, "name": f"{RUN['name']}-{seed}"})
    print(train(config, prompts=prompts, reward=reward, examples=examples))
