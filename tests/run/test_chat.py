"""``kimi chat``: responses of kept states, their rewards, and prompts typed or the run's."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core import cli
from kimi_core.run.chat import Chat
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.run.trajectories import read_trajectories, visible


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that keeps every state; its first iteration has responses of the state before RL."""
    work = tmp_path_factory.mktemp("work")
    (work / "tiny.toml").write_text(TINY)
    settings = [f"runs={work}", "keep_states=9", "sft.steps=2"]
    config = load_config(work / "tiny.toml", settings)
    return train(config, console=Console(file=io.StringIO()))


def chat(capsys, run: Path, *arguments: str) -> tuple[int, str]:
    status = cli.main(["chat", str(run), *arguments])
    found = capsys.readouterr()
    return status, found.out + found.err


def test_the_same_prompt_before_and_after_with_rewards(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    one = next(read_trajectories(run / "trajectories" / "000001.jsonl"))
    arguments = ("--prompt", str(one.prompt_id), "--samples", "3", "--before")
    status, said = chat(capsys, run, *arguments)
    assert status == 0, said
    assert f"prompt\n  | {one.prompt}\nreference answer\n  | {one.answer}\n" in said
    first, second = said.split("\nbefore RL\n")[1].split("\nafter iteration 2\n")
    for part in (first, second):
        rewards = re.findall(r"^--- \d: reward ([01]), end \w+, \d+ tokens$", part, re.MULTILINE)
        assert len(rewards) == 3
        mean = sum(map(float, rewards)) / 3
        assert f"mean reward {mean:.3f}, " in part
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert chat(capsys, run, *arguments) == (status, said)


def test_each_state_answers_with_its_weights(run, capsys):
    said = [chat(capsys, run, "2*345=", "--at", str(number))[1] for number in (0, 1, 2)]
    assert said[2] == chat(capsys, run, "2*345=")[1]
    assert "after iteration 1" in said[1] and "before RL" in said[0]
    status, refused = chat(capsys, run, "2*345=", "--at", "7")
    assert status == 2
    assert "has no state after iteration 7; it has those after 0, 1, 2. Raise" in refused


def test_lines_are_asked_one_by_one_and_an_answer_is_found_or_given(run, capsys, monkeypatch):
    known = next(read_trajectories(run / "trajectories" / "000001.jsonl"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{known.prompt}\n\n9*9=\n"))
    status, said = chat(capsys, run, "--samples", "1")
    assert status == 0, said
    first, second = said.split("prompt\n")[1:]
    assert f"reference answer\n  | {known.answer}\n" in first and "reward " in first
    assert "--- 1: no reward: give --answer" in second and "reference" not in second
    _, said = chat(capsys, run, "9*9=", "--answer", "81", "--samples", "1")
    assert re.search(r"--- 1: reward [01]", said)


def test_what_the_model_says_cannot_steer_the_terminal(run):
    """A random model says little, so the text is checked where it is made."""
    model = Chat(run)
    try:
        segments = "\n".join(model.ask(model.typed("3*3=", "9\x1b[2J\u202e"), 1))
    finally:
        model.close()
    assert segments == visible(segments) and "9\\x1b[2J\\u202e" in segments


def test_what_cannot_be_asked_is_refused(run, tmp_path, capsys):
    assert "is not the folder of a run" in chat(capsys, tmp_path, "1")[1]
    assert "The run has no prompt 123456789" in chat(capsys, run, "--prompt", "123456789")[1]
    status, said = chat(capsys, run, "q", "--samples", "1")
    assert status == 2 and "cannot be tokenized" in said
    assert chat(capsys, run, "1", "--samples", "0") == (2, "error: --samples 0: at least 1\n")
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    assert "has no state to ask" in chat(capsys, tmp_path, "1")[1]
