"""`kimi warmup`: right answers alone, the richest first, in the format of `sft.data`."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY, make_folder

from kimi_core import cli
from kimi_core.prompts.jsonl import load_examples
from kimi_core.prompts.load import load_prompts, split
from kimi_core.run.config_file import load_config
from kimi_core.run.warmup import behaviours_of, warm_up

REWARD = """
def reward(prompt, response):
    assert prompt.text.endswith("#")
    return len(response) % 2
"""

SETTINGS = [
    "name=w",
    "model.name=model",
    "prompts.source=p.py:prompts",
    "reward.function=r.py:reward",
    'warmup.ask="{prompt}#"',
    "rollout.max_response_tokens=12",
    "rollout.stop=[';']",
]

PROMPTS = """
from kimi_core.tasks import multiply


def prompts():
    return multiply.prompts()[:12]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("r.py").write_text(REWARD)
    Path("p.py").write_text(PROMPTS)
    make_folder(tmp_path / "model")
    return tmp_path


def made(*overrides) -> Path:
    return warm_up(load_config("tiny.toml", [*SETTINGS, *overrides]), console=Console(quiet=True))


def test_examples_are_right_whole_and_the_longest(folder):
    config = load_config("tiny.toml", SETTINGS)
    prompts, held_out = split(load_prompts(config.prompts), 4, 0)
    path = made()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    record = map(json.loads, Path("runs/w/answers.jsonl").read_text().splitlines())
    answers = [line["answers"] for line in record if "prompt" in line]
    assert len(answers) == len(prompts) == 8
    assert lines and {line["prompt"] for line in lines} <= {one.text for one in prompts}
    assert not {line["prompt"] for line in lines} & {one.text for one in held_out}
    wanted = []
    for some in answers:
        fit = [one for one in some if one["reward"] and one["end"] == "stop"]
        if fit:
            wanted.append(max((len(behaviours_of(one["text"])), one["tokens"]) for one in fit))
    found = [(len(line["behaviours"]), line["tokens"]) for line in lines]
    assert sorted(found) == sorted(wanted)
    assert load_examples(path) == [(line["prompt"], line["response"]) for line in lines]
    page = Path("runs/w/warmup.md").read_text()
    assert f"{len(lines)} examples from 8 prompts" in page and "| all | 64 |" in page


def test_more_of_a_prompt_and_only_long_ones(folder):
    made("warmup.keep=8", "warmup.least_tokens=4")
    lines = [json.loads(line) for line in Path("runs/w/warmup.jsonl").read_text().splitlines()]
    assert min(line["tokens"] for line in lines) >= 4
    pairs = [(line["prompt"], line["response"]) for line in lines]
    assert len(pairs) == len(set(pairs)) > len({prompt for prompt, _ in pairs})


@pytest.mark.parametrize(
    ("reward", "overrides", "said"),
    [
        ("0", [], "no answer of the model is right"),
        ("1", ["warmup.least_tokens=99"], "warmup.least_tokens = 99: lower it"),
        ("1", ["rollout.max_response_tokens=1", "rollout.stop=[]"], "is empty or was cut"),
    ],
)
def test_no_example_is_explained_and_the_answers_stay(folder, reward, overrides, said):
    Path("r.py").write_text(f"def reward(prompt, response):\n    return {reward}\n")
    with pytest.raises(ValueError, match=said):
        made(*overrides)
    assert Path("runs/w/answers.jsonl").exists() and Path("runs/w/warmup.md").exists()
    assert not Path("runs/w/warmup.jsonl").exists()


def test_the_examples_are_what_sft_takes(folder, capsys):
    arguments = ["tiny.toml", *SETTINGS]
    assert cli.main(["warmup", *arguments]) == 0
    assert "runs/w/warmup.jsonl" in capsys.readouterr().out
    sft = ["name=s", "sft.data=runs/w/warmup.jsonl", "sft.steps=2", "sft.batch_size=2"]
    Path("r.py").write_text("def reward(prompt, response):\n    return 0\n")
    assert cli.main(["sft", *arguments, *sft]) == 0
    assert Path("runs/s/checkpoint/config.json").exists()


@pytest.mark.parametrize(
    ("text", "behaviours"),
    [
        ("First, I add the tens.", ["plan"]),
        ("7*4=28>8,2#28?7*4=28>8,2#28", ["evaluate"]),
        ("So x = 3. Let me verify it: 2*3 = 6.", ["evaluate"]),
        ("x = 3. Wait, this cannot be.", ["reflect"]),
        ("Alternatively, count the pairs.", ["explore"]),
        ("What is x?", []),
        ("The waiter paid the checkered bill.", []),
    ],
)
def test_behaviours(text, behaviours):
    assert behaviours_of(text) == behaviours
