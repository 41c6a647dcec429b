"""Put letters in order. `python examples/sort_letters.py` takes minutes on two cores."""

import random
import sys

from kimi_core import Config, Prompt, Score, train

RUN = {
    "name": "sort-letters",
    "iterations": 40,
    "model": {"scratch": {"layers": 2, "width": 64, "context": 32}},
    "prompts": {"held_out": 200},
    "sft": {"steps": 250},
    "rollout": {"prompts_per_iteration": 32, "max_response_tokens": 12},
    "trainer": {"learning_rate": 3e-4},
    "evaluation": {"every": 10},
}


def prompts() -> list[Prompt]:
    rng = random.Random(0)
    texts = {"".join(rng.choices("abcdefgh", k=rng.randint(4, 8))) for _ in range(4000)}
    return [
        Prompt(row, f"{text}>", "".join(sorted(text))) for row, text in enumerate(sorted(texts))
    ]


def reward(prompt: Prompt, response: str) -> Score:
    """1 for the answer; otherwise half of the share of places that are right."""
    pairs = zip(response.ljust(len(prompt.answer)), prompt.answer, strict=False)
    right = sum(one == other for one, other in pairs) / len(prompt.answer)
    solved = response == prompt.answer
    return Score(1.0 if solved else right / 2, {"solved": float(solved)})


def examples(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """Right answers to a quarter of the training prompts."""
    return [(prompt.text, prompt.answer) for prompt in prompts[::4]]


if __name__ == "__main__":
    config = Config.model_validate(RUN | {"seed": int([*sys.argv, "0"][1])})
    print(train(config, prompts=prompts, reward=reward, examples=examples))
