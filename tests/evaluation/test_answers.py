"""Answers are drawn, judged and recorded once, whatever happens in between."""

import json
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import TINY, make_folder

from kimi_core.evaluation.answers import Draw, Responder
from kimi_core.evaluation.record import Answer, Record, key_of
from kimi_core.reward.base import RewardOutage
from kimi_core.run.config_file import load_config
from kimi_core.tasks import multiply
from kimi_core.types import Prompt

PROMPTS = multiply.prompts()[:5]
DRAW = Draw("solve", samples=3, max_tokens=6, temperature=1.2)

REWARD = """
from pathlib import Path

from kimi_core.reward.base import InfrastructureError


def reward(prompt, response):
    with open("calls", "a") as file:
        file.write(f"{prompt.id}\\n")
    if Path("away").exists():
        raise InfrastructureError("the checker is away")
    return float(len(response) % 2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "r.py").write_text(REWARD)
    make_folder(tmp_path / "model")
    return tmp_path


def drawn(path, prompts, draw=DRAW, overrides=()) -> list[list[Answer]]:
    settings = ["model.name=model", "reward.function=r.py:reward", *overrides]
    config = load_config("tiny.toml", settings)
    with closing(Responder(config)) as responder, closing(Record(path)) as record:
        responder.draw(draw, prompts, record)
        return [record.answers(draw.name, key_of(prompt)) for prompt in prompts]


def test_a_record_that_goes_on_is_that_of_one_go(folder):
    whole = drawn(folder / "whole.jsonl", PROMPTS)
    assert [len(some) for some in whole] == [3] * 5
    assert all(1 <= one.tokens <= 6 for some in whole for one in some)
    assert all(one.reward == len(one.text) % 2 for some in whole for one in some)
    (folder / "calls").unlink()
    drawn(folder / "parts.jsonl", PROMPTS[:2])
    drawn(folder / "parts.jsonl", PROMPTS[1:4])
    assert drawn(folder / "parts.jsonl", PROMPTS[::-1])[::-1] == whole
    calls = (folder / "calls").read_text().split()
    assert sorted(calls) == sorted(3 * [str(prompt.id) for prompt in PROMPTS])


def test_prompts_that_are_the_same_are_answered_once(folder):
    twice = [PROMPTS[0], Prompt(99, PROMPTS[0].text, PROMPTS[0].answer)]
    first, second = drawn(folder / "a.jsonl", twice)
    assert first == second
    assert len((folder / "a.jsonl").read_text().splitlines()) == 2


def test_other_settings_are_named(folder):
    drawn(folder / "a.jsonl", PROMPTS[:1])
    other = Draw("solve", samples=4, max_tokens=6, temperature=1.2)
    with pytest.raises(ValueError, match="samples = 3, and asked for is samples = 4: put the set"):
        drawn(folder / "a.jsonl", PROMPTS, other)
    make_folder(folder / "model", seed=1)
    with pytest.raises(ValueError, match="drawn with weights = "):
        drawn(folder / "a.jsonl", PROMPTS)
    drawn(folder / "a.jsonl", PROMPTS, Draw("guess", samples=1, max_tokens=2, temperature=0))


def test_a_reward_that_is_away_stops_the_draw_and_loses_nothing(folder):
    drawn(folder / "a.jsonl", PROMPTS[:1])
    (folder / "away").touch()
    with pytest.raises(RewardOutage, match="the checker is away"):
        drawn(folder / "a.jsonl", PROMPTS)
    (folder / "away").unlink()
    assert all(
        one.reward is not None for some in drawn(folder / "a.jsonl", PROMPTS) for one in some
    )


def test_a_prompt_that_nobody_can_judge_does_not_stop_the_others(folder):
    judge = (
        "def reward(prompts, responses):\n    return [None if p.id == 2 else 1.0 for p in prompts]"
    )
    (folder / "r.py").write_text(judge)
    found = drawn(folder / "a.jsonl", PROMPTS)
    assert [some[0].reward for some in found] == [1.0, 1.0, None, 1.0, 1.0]


def test_untrained_and_unfit(folder):
    with pytest.raises(ValueError, match="random weights"):
        drawn(folder / "a.jsonl", PROMPTS, overrides=["model.name=scratch"])
    with pytest.raises(ValueError, match="attends to 32 positions"):
        drawn(folder / "a.jsonl", PROMPTS, Draw("solve", samples=1, max_tokens=30))


ANSWERS = st.lists(
    st.builds(
        Answer,
        text=st.text(),
        tokens=st.integers(1, 9),
        end=st.just("stop"),
        reward=st.none() | st.floats(-2, 2),
    ),
    max_size=3,
)


@given(st.lists(ANSWERS, min_size=1, max_size=4), st.data())
def test_a_file_that_is_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("record") / "a.jsonl"
    with closing(Record(path)) as record:
        record.begin("solve", {"samples": 3})
        for row, answers in enumerate(lines):
            record.add("solve", str(row), answers)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    with closing(Record(path)) as record:
        record.begin("solve", {"samples": 3})
        whole = max(content[:cut].count(b"\n") - 1, 0)
        kept = [row for row in range(len(lines)) if record.has("solve", str(row))]
        assert kept == list(range(whole)) and record.count("solve") == whole
        for row, answers in enumerate(lines):
            if row >= whole:
                record.add("solve", str(row), answers)
        assert [record.answers("solve", str(row)) for row in range(len(lines))] == lines
    assert path.read_bytes() == content


def test_damage_and_a_second_process_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    with closing(Record(path)) as record:
        record.begin("solve", {})
        with pytest.raises(ValueError, match="Another process writes"):
            Record(path)
    path.write_text(path.read_text() + json.dumps({"draw": "solve"}) + "\n{}\n")
    with pytest.raises(ValueError, match=r"line 2 is damaged \(KeyError: 'answers'\): delete"):
        Record(path)
