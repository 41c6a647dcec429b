"""``prompts.jsonl``: a line for each prompt that an iteration trained, also after a resume."""

import json

import numpy as np
import pytest

from kimi_core.config import CurriculumConfig
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.run.prompt_lines import TEXT_SHOWN, PromptLines
from kimi_core.types import Group, Prompt

PROMPTS = [Prompt(0, "1+1=", "2"), Prompt(1, "9" * 500, "3", difficulty=0.9)]


def group(prompt: Prompt, correctness: list[float]) -> Group:
    values = np.array(correctness)
    return Group(0, prompt, (), values, values, values, values, values, values)


@pytest.fixture
def curriculum() -> Curriculum:
    found = Curriculum(PROMPTS, CurriculumConfig())
    for correctness in (1.0, 0.0, 0.0, 0.0):
        found.record(0, correctness)
    return found


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_a_line_for_each_prompt_with_what_the_curriculum_knows(tmp_path, curriculum):
    groups = [group(PROMPTS[0], [1.0, 0.0, 0.0, 0.0]), group(PROMPTS[1], [0.5])]
    PromptLines(tmp_path).write(1, groups, curriculum)
    rate = curriculum.success_rate(0)
    assert read(tmp_path)[0] == {
        "iteration": 1,
        "prompt_id": 0,
        "prompt": "1+1=",
        "responses": 4,
        "correctness": 0.25,
        "success_rate": pytest.approx(rate, abs=1e-6),
        "weight": pytest.approx(1 - rate, abs=1e-6),
        "difficulty": pytest.approx(1 - rate, abs=1e-6),
    }
    assert (read(tmp_path)[1]["difficulty"], len(read(tmp_path)[1]["prompt"])) == (0.9, TEXT_SHOWN)
    weights = curriculum.weights(1)
    assert [line["weight"] for line in read(tmp_path)] == pytest.approx(list(weights), abs=1e-6)


def test_a_resumed_run_drops_what_it_does_again_and_a_torn_line(tmp_path, curriculum):
    lines = PromptLines(tmp_path)
    for iteration in (1, 2, 3):
        lines.write(iteration, [group(PROMPTS[0], [1.0])], curriculum)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"iteration": 2, "torn')
    PromptLines(tmp_path, start_iteration=2).write(3, [group(PROMPTS[1], [0.0])], curriculum)
    assert [(one["iteration"], one["prompt_id"]) for one in read(tmp_path)] == [
        (1, 0),
        (2, 0),
        (3, 1),
    ]
