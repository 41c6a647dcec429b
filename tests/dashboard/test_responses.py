"""The index of a trajectory file finds every response, whatever its text says."""

import json

import pytest
from hostile_texts import HOSTILE
from made_runs import make_run

from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.responses import TEXT_SHOWN, IterationFile
from kimi_core.run.trajectories import read_trajectories


def indexed(run, number: int) -> IterationFile:
    return IterationFile(run / "trajectories" / f"{number:06d}.jsonl", number)


def test_each_response_is_what_the_run_recorded(trained):
    for number in (1, 2, 3):
        file = indexed(trained, number)
        records = list(read_trajectories(file.path))
        assert list(file.places) == [one.trajectory_id for one in records]
        for one in records:
            found = file.response(one.trajectory_id)
            found.pop("neighbours")
            assert found == json.loads(json.dumps(vars(one)))


def test_the_summary_has_the_columns_and_ages_of_all(trained):
    found = indexed(trained, 3).summary()
    records = list(read_trajectories(trained / "trajectories" / "000003.jsonl"))
    assert found["columns"]["reward"] == [one.reward for one in records]
    assert found["columns"]["tokens"] == [len(one.token_ids) for one in records]
    ages: dict[int, int] = {}
    for one in records:
        for version, count in one.versions:
            ages[2 - version] = ages.get(2 - version, 0) + count
    assert dict(found["ages"]) == ages
    assert len(ages) > 1  # The run has partial rollouts.


def test_a_group_has_its_responses_without_tokens(trained):
    file = indexed(trained, 3)
    records = list(read_trajectories(file.path))
    group = records[-1].group_id
    found = file.group(group)["responses"]
    assert [one["response"] for one in found] == [
        one.response for one in records if one.group_id == group
    ]
    assert "token_ids" not in found[0] and "prompt_ids" not in found[0]


def test_hostile_texts_are_found_as_they_are(tmp_path):
    run = make_run(tmp_path / "run", iterations=1, groups=1, samples=len(HOSTILE), texts=HOSTILE)
    file = indexed(run, 1)
    assert [file.response(at)["response"] for at in range(len(HOSTILE))] == HOSTILE
    cut = file.group(0)["responses"]
    assert [one["response"] for one in cut] == [text[:TEXT_SHOWN] for text in HOSTILE]
    assert cut[-1]["response_characters"] == len(HOSTILE[-1])


def test_damaged_and_cut_lines_are_counted(tmp_path):
    run = make_run(tmp_path / "run", iterations=1)
    path = run / "trajectories" / "000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    other = b'{"trajectory_id":9,"group_id":0,"prompt":"p","versions":[[1]]}\n'
    path.write_bytes(lines[0] + b"nonsense\n" + other + lines[1] + lines[2][:50])
    file = indexed(run, 1)
    assert (list(file.places), file.broken) == ([0, 1], 3)
    path.write_bytes(b"")
    assert indexed(run, 1).summary()["columns"]["reward"] == []


def test_neighbours_are_those_of_the_group(tmp_path):
    file = indexed(make_run(tmp_path / "run", iterations=1), 1)
    assert [file.response(one)["neighbours"] for one in (0, 1, 2, 3)] == [
        [None, 1],
        [0, 2],
        [1, None],
        [None, 4],
    ]
    assert file.group(0)["neighbours"] == [None, 1]


def test_what_is_not_there_is_named(tmp_path):
    file = indexed(make_run(tmp_path / "run", iterations=1), 1)
    with pytest.raises(Missing, match="Iteration 1 has no response 99"):
        file.response(99)
    with pytest.raises(Missing, match="Iteration 1 has no group 99"):
        file.group(99)
