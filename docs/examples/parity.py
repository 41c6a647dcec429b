"""Is the number of ones even (0) or odd (1)? Minutes on two cores:

    python docs/examples/parity.py

    prompt    10110:
    guess     #1
    worked    1b0b1a1b0b#1

The worked way has each digit, and a or b for even or odd so far. The examples show both ways, and
all of them are right. But the model's guesses are right half of the time, and rewards find out.
"""

import random
import sys

from kimi_core import Config, Prompt, train

RUN = {
    "name": "parity",
    "iterations": 40,
    "model": {"scratch": {"layers": 2, "width": 64, "context": 64}},
    "prompts": {"held_out": 200},
    "sft": {"steps": 1000},
    "rollout": {"prompts_per_iteration": 32, "max_response_tokens": 32},
    "trainer": {"learning_rate": 1e-4},
    "evaluation": {"every": 10},
}


def prompts() -> list[Prompt]:
    rng = random.Random(0)
    asked = {"".join(rng.choices("01", k=rng.randint(6, 10))) for _ in range(3000)}
    return [
        Prompt(row, f"{bits}:", str(bits.count("1") % 2)) for row, bits in enumerate(sorted(asked))
    ]


def reward(prompt: Prompt, response: str) -> float:
    return float(response.rpartition("#")[2] == prompt.answer)


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [(p.text, worked(p) if rng.random() < 0.4 else f"#{p.answer}") for p in prompts]


def worked(prompt: Prompt) -> str:
    bits = prompt.text.rstrip(":")
    steps = (f"{one}{'ab'[bits[: at + 1].count('1') % 2]}" for at, one in enumerate(bits))
    return "".join(steps) + f"#{prompt.answer}"


if __name__ == "__main__":
    seed = int([*sys.argv, "0"][1])
    config = Config.model_validate(RUN | {"seed": seed, "name": f"{RUN['name']}-{seed}"})
    print(train(config, prompts=prompts, reward=reward, examples=examples))
