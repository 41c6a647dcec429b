"""The items of the comparison with lm-evaluation-harness, from files in the harness's format."""

import json

import pytest
from compare_lm_eval import MADE, choices, harness, tasks_of, word_problems, write

from kimi_core.evaluation.benchmarks import load_benchmark

GSM8K = {
    "question": "There are 15 trees, and later 21. How many were planted?",
    "target": "21 - 15 = 6. The answer is 6.",
}
TOO_LONG = {"question": "x" * 700 + "\n(A) 1 (B) 2 (C) 3 (D) 4", "target": "The answer is (A)."}
MMLU = {
    "question": "Which is even?\n\n(A) 3 (B) 5 (C) 8 (D) 9",
    "target": "Let's think. The answer is (C).",
}


@pytest.fixture
def tasks(tmp_path):
    """JSON is YAML."""
    made = {"gsm8k/gsm8k-cot": [GSM8K], "mmlu/flan_cot_fewshot/mmlu_numbers": [TOO_LONG, MMLU]}
    for name, samples in made.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"fewshot_config": {"samples": samples}}))
    return tmp_path


def test_items_are_in_the_formats_of_benchmarks(tasks, tmp_path):
    problems = load_benchmark("gsm8k", [write(tmp_path / "a.jsonl", [*word_problems(tasks)])])
    assert len(problems) == 1 + MADE and problems[0].answer == "6"
    assert all(int(one.answer) > 0 for one in problems)
    assert len({one.text for one in problems}) == len(problems)
    (question,) = load_benchmark("mmlu", [write(tmp_path / "b.jsonl", [*choices(tasks)])])
    assert question.answer == "C" and "Which is even?\n\nA) 3\nB) 5\nC) 8\nD) 9" in question.text
    assert question.tags["subject"] == "numbers"


def test_tasks_name_their_files(tmp_path):
    for one in tasks_of(tmp_path):
        assert one["dataset_kwargs"]["data_files"]["test"].startswith(str(tmp_path))
        assert one["task"] and one["metric_list"]


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("compare_lm_eval.version", lambda name: "0.3")
    with pytest.raises(SystemExit, match=r"lm_eval 0\.3 is installed: pip install lm_eval==0\."):
        harness()
