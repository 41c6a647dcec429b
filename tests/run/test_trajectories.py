"""The record of every response: what is in it, how it is thinned, and what a person is shown."""

import json
import math
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.config import TrajectoriesConfig
from kimi_core.loop import Outcome
from kimi_core.run.trajectories import (
    TrajectoryFiles,
    TrajectoryRecord,
    read_trajectories,
    records_of,
    sample_text,
    visible,
)
from kimi_core.types import Group, Prompt, Trajectory

PROMPT = Prompt(7, "3*214=", "642")


def trajectory(key: int) -> Trajectory:
    return Trajectory(
        trajectory_id=key,
        prompt_id=7,
        group_id=2,
        token_ids=np.array([6, 17, 5, 9, 7, 1], np.int32),
        logprobs=np.array([0, 0, 0, -0.1, -0.7, -1 / 3], np.float32),
        mask=np.array([0, 0, 0, 1, 1, 1], np.uint8),
        policy_versions=np.array([-1, -1, -1, 4, 4, 5], np.int32),
        end_reason="stop",
    )


@pytest.fixture
def records() -> list[TrajectoryRecord]:
    """One trained response and one without a verdict."""
    group = Group(
        group_id=2,
        prompt=PROMPT,
        trajectories=(trajectory(11),),
        correctness=np.array([1.0]),
        length_rewards=np.array([0.25]),
        penalties=np.array([0.5]),
        advantages=np.array([0.125]),
        ended_rewards=np.array([0.75, 0.5]),
    )
    own = np.array([math.nan, math.nan, math.nan, -0.2, math.nan, -1 / 3], np.float32)
    entropies = np.array([math.nan, math.nan, math.nan, 0.25, math.nan, 2 / 3], np.float32)
    outcome = Outcome([group], [trajectory(12)], {11: own}, {11: entropies})
    return records_of(outcome, 6, {7: PROMPT}, lambda ids: "".join(map(str, ids.tolist())))


def test_a_record_has_everything_known_of_a_response(records):
    trained, unjudged = records
    assert trained == TrajectoryRecord(
        iteration=6,
        trajectory_id=11,
        group_id=2,
        prompt_id=7,
        prompt="3*214=",
        answer="642",
        response="971",
        end_reason="stop",
        versions=[(4, 2), (5, 1)],
        correctness=1.0,
        length_reward=0.25,
        penalty=0.5,
        reward=0.75,
        advantage=0.125,
        prompt_ids=[6, 17, 5],
        token_ids=[9, 7, 1],
        engine_logprobs=[-0.1, -0.7, -0.333333],
        trainer_logprobs=[-0.2, None, -0.333333],
        entropies=[0.25, None, 0.667],
    )
    assert unjudged == replace(
        trained,
        trajectory_id=12,
        correctness=None,
        length_reward=None,
        penalty=None,
        reward=None,
        advantage=None,
        trainer_logprobs=[],
        entropies=[],
    )


def test_files_read_back_as_written(tmp_path: Path, records):
    TrajectoryFiles(tmp_path, TrajectoriesConfig()).write(6, records)
    assert list(read_trajectories(tmp_path / "trajectories" / "000006.jsonl")) == records


def test_thinning_leaves_out_iterations_and_tokens(tmp_path: Path, records):
    files = TrajectoryFiles(tmp_path, TrajectoriesConfig(every=3, tokens=False))
    for iteration in range(1, 8):
        files.write(iteration, records)
    paths = sorted((tmp_path / "trajectories").iterdir())
    assert [path.name for path in paths] == ["000003.jsonl", "000006.jsonl"]
    line = json.loads(paths[0].read_text().splitlines()[0])
    assert "token_ids" not in line and line["response"] == "971"
    assert next(read_trajectories(paths[0])).token_ids == []
    TrajectoryFiles(tmp_path / "none", TrajectoriesConfig(every=0)).write(1, records)
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_drops_what_it_will_do_a_second_time(tmp_path: Path, records):
    files = TrajectoryFiles(tmp_path, TrajectoriesConfig())
    for iteration in (1, 2, 3):
        files.write(iteration, records)
    TrajectoryFiles(tmp_path, TrajectoriesConfig(), start_iteration=2)
    assert sorted(path.stem for path in (tmp_path / "trajectories").iterdir()) == [
        "000001",
        "000002",
    ]


def test_samples_are_readable(tmp_path: Path, records):
    TrajectoryFiles(tmp_path, TrajectoriesConfig()).write_samples(10, records)
    assert (tmp_path / "samples" / "000010.txt").read_text() == (
        "Iteration 10\n\n--- 1: reward 0.75, end stop, policy versions 4, 5\n"
        "prompt\n  | 3*214=\nresponse\n  | 971\n\n"
        "--- 2: no verdict, end stop, policy versions 4, 5\n"
        "prompt\n  | 3*214=\nresponse\n  | 971\n"
    )


@given(text=st.text(alphabet=st.characters()))
def test_what_a_model_writes_cannot_steer_a_terminal(text: str) -> None:
    shown = visible(text)
    shown.encode()  # Lone surrogates would not go into the file.
    assert shown.count("\n") == text.count("\n")
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in shown)
    assert len(shown.splitlines()) <= text.count("\n") + 1  # No other line break is left.


def test_a_response_cannot_pose_as_another_sample(records):
    hostile = "6\x1b[2J\r--- 9\n--- 2: reward 1, end stop, policy versions 4\u202e"
    text = sample_text(1, [replace(records[0], response=hostile)])
    assert len(re.findall(r"^---", text, re.MULTILINE)) == 1
    assert r"  | 6\x1b[2J\r--- 9" in text
