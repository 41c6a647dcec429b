"""Which weekday comes n days later? `python examples/next_weekday.py` takes minutes on two cores.

    prompt    Tue+23=
    guess     #Thu
    worked    23-21=2;Wed,Thu#Thu

The examples show both ways to answer, and rewards decide which one the model keeps.
"""

import random
import sys

from kimi_core import Config, Prompt, train

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]

RUN = {
    "name": "next-weekday",
    "iterations": 25,
    "model": {"scratch": {"layers": 2, "width": 64, "context": 64}},
    "prompts": {"held_out": 100},
    "sft": {"steps": 600},
    "rollout": {"prompts_per_iteration": 32, "max_response_tokens": 40},
    "trainer": {"learning_rate": 1e-4},
    "evaluation": {"every": 5},
}


def prompts() -> list[Prompt]:
    asked = [(day, n) for day in range(7) for n in range(1, 100)]
    return [
        Prompt(row, f"{DAYS[day]}+{n}=", DAYS[(day + n) % 7]) for row, (day, n) in enumerate(asked)
    ]


def reward(prompt: Prompt, response: str) -> float:
    return float(response.rpartition("#")[2] == prompt.answer)


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [(p.text, worked(p) if rng.random() < 0.4 else f"#{p.answer}") for p in prompts]


def worked(prompt: Prompt) -> str:
    day, _, number = prompt.text.rstrip("=").partition("+")
    first, n = DAYS.index(day), int(number)
    passed = [DAYS[(first + step) % 7] for step in range(1, n % 7 + 1)]
    return f"{n}-{n - n % 7}={n % 7};{','.join(passed)}#{prompt.answer}"


if __name__ == "__main__":
    config = Config.model_validate(RUN | {"seed": int([*sys.argv, "0"][1])})
    print(train(config, prompts=prompts, reward=reward, examples=examples))
