"""The tasks of docs/examples: their examples are what they say, and their settings make a run."""

import runpy
import sys
from pathlib import Path

import pytest

from kimi_core.config import Config

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.mark.parametrize(("name", "right"), [("parity", 1.0), ("reverse_words", 0.5)])
def test_the_examples_of_a_task(name, right, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    task = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    config = Config.model_validate(task["RUN"])
    prompts = task["prompts"]()
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == len(texts) > 2 * config.prompts.held_out
    examples = task["examples"](prompts)
    assert [text for text, _ in examples] == texts
    rewards = [
        task["reward"](prompt, text) for prompt, (_, text) in zip(prompts, examples, strict=True)
    ]
    assert sum(rewards) / len(rewards) == pytest.approx(right, abs=0.05)
    longest = max(len(response) for _, response in examples)
    assert longest < config.rollout.max_response_tokens
