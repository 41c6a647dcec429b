"""Several reward functions at once, batches, async functions, and scores with parts."""

import asyncio
import json
import threading

import pytest

from kimi_core.config import RewardConfig
from kimi_core.metrics import read_metrics
from kimi_core.reward.base import InfrastructureError, RewardError, RewardOutage
from kimi_core.reward.combined import CombinedReward, Part
from kimi_core.reward.judging import judge_all
from kimi_core.reward.load import close_reward, load_reward, try_reward
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.types import Prompt, Score

PROMPTS = [Prompt(n, f"{n}?", str(n)) for n in range(4)]
RESPONSES = [(prompt, f"it is {prompt.id % 2}") for prompt in PROMPTS]


def right(prompt, text):
    return text.split()[-1] == prompt.answer


async def long_enough(prompt, text):
    await asyncio.sleep(0.001)
    return Score(len(text) / 10, {"characters": len(text)}, note=text)


def batch(prompts, texts):
    return [0.5 * right(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


async def async_batch(prompts, texts):
    return batch(prompts, texts)


class Callable:
    async def __call__(self, prompt, text):
        return 2 * right(prompt, text)


def values(function, **options):
    options = {"workers": 1, "outage_from": 5} | options
    return [one and one.value for one in judge_all(function, RESPONSES, **options)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (right, [1, 1, 0, 0]),
        (long_enough, [0.7] * 4),
        (batch, [0.5, 0.5, 0, 0]),
        (async_batch, [0.5, 0.5, 0, 0]),
        (Callable(), [2, 2, 0, 0]),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_way_to_be_called(function, expected, workers):
    assert values(function, workers=workers) == expected


def test_a_sum_with_its_parts():
    parts = [Part("right", 1.0, right), Part("long", 0.1, long_enough), Part("batch", -1, batch)]
    first, *_, last = judge_all(CombinedReward(parts), RESPONSES, workers=2, outage_from=5)
    assert first.value == pytest.approx(1 + 0.07 - 0.5) and last.value == pytest.approx(0.07)
    assert first.parts == {"right": 1, "long": 0.7, "long.characters": 7, "batch": 0.5}
    assert first.note == "long: it is 0"


def test_at_most_so_many_async_calls_at_the_same_time():
    running, most = 0, 0

    async def count(prompt, text):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 0

    judge_all(count, RESPONSES * 5, workers=3, outage_from=99)
    assert most == 3


def test_threads_are_used_for_plain_functions_only():
    seen = set()

    def note(prompt, text):
        seen.add(threading.current_thread().name)
        return 0

    judge_all(note, RESPONSES, workers=2, outage_from=5)
    assert all(name.startswith("reward") for name in seen)


def away(prompt, text):
    if prompt.id == 2:
        raise InfrastructureError("away")
    return 1


async def async_away(prompt, text):
    return away(prompt, text)


def batch_away(prompts, texts):
    return [None if prompt.id == 2 else 1 for prompt in prompts]


@pytest.mark.parametrize("function", [away, async_away, batch_away])
def test_no_verdict_in_any_way(function):
    assert values(function) == [1, 1, None, 1]
    whole = CombinedReward([Part("a", 1, right), Part("b", 1, function)])
    assert values(whole) == [2, 2, None, 1]


def test_a_batch_that_cannot_be_reached_is_an_outage():
    def gone(prompts, texts):
        raise InfrastructureError("away")

    with pytest.raises(RewardOutage, match="away"):
        values(gone, outage_from=2)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts, texts: [1], "1 results for 4 responses"),
        (lambda prompts, texts: 1 / 0, "ZeroDivisionError"),
        (lambda prompts, texts: ["a"] * 4, "returned 'a'"),
        (lambda prompt, text: Score(float("nan")), "Score"),
        (lambda prompt, text: Score(1.0, {"a": "b"}), "Score"),
        (lambda prompt: 1, "TypeError"),
        (lambda prompt, text: None, "returned None"),
    ],
)
def test_faults_are_named(function, said):
    with pytest.raises(RewardError, match=said):
        values(function)


def test_a_trial_finds_a_wrong_signature_before_a_run():
    with pytest.raises(RewardError, match="TypeError"):
        try_reward(lambda prompt: 1, PROMPTS)
    try_reward(away, PROMPTS[2:])  # No verdict is no fault.


def test_names_of_the_parts():
    functions = [{"function": "match"}, {"function": "match", "weight": 0.5}]
    with pytest.raises(ValueError, match=r"match is there twice"):
        load_reward(RewardConfig(functions=functions))
    functions[1]["name"] = "again"
    reward = load_reward(RewardConfig(functions=functions))
    assert [(part.name, part.weight) for part in reward.parts] == [("match", 1), ("again", 0.5)]
    close_reward(reward)


CONFIG = """
name = "several"
iterations = 2

[model]
device = "cpu"

[model.scratch]
layers = 1
width = 16
heads = 2
context = 64

[prompts]
held_out = 3

[sft]
data = "multiply"
steps = 2

[rollout]
prompts_per_iteration = 2
samples_per_prompt = 3
max_response_tokens = 8

[[reward.functions]]
function = "match"

[[reward.functions]]
function = "style.py:Style"
weight = 0.5
name = "style"
"""
STYLE = """
from kimi_core.types import Score

async def Style(prompt, text):
    return Score(0.25, {"digits": float(sum(map(str.isdigit, text)))}, note=f"<{text}>")
"""


@pytest.mark.nightly
def test_parts_and_notes_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several.toml").write_text(CONFIG)
    (tmp_path / "style.py").write_text(STYLE)
    folder = train(load_config("several.toml"))
    iterations, evaluations = read_metrics(folder / "metrics.jsonl")
    for line in (*iterations, *evaluations):
        assert line.reward_parts.keys() == {"match", "style", "style.digits"}
        assert line.reward_parts["style"] == 0.25
    records = [
        json.loads(line)
        for path in sorted((folder / "trajectories").glob("*.jsonl"))
        for line in path.open()
    ]
    assert len(records) == 12
    for one in records:
        assert one["note"] == f"style: <{one['response']}>"
        assert one["correctness"] == one["reward_parts"]["match"] + 0.125
    train(load_config("several.toml", ["iterations=3"]), resume=True)
