"""A file is followed by byte offset, also when it is cut, replaced or damaged."""

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kimi_core.dashboard.follow import Follower
from kimi_core.run.files import write_atomically


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers)


def numbers(follower: Follower) -> list[int]:
    return [record["n"] for record in follower.read()]


def test_a_file_that_is_not_there_is_empty_until_it_is(tmp_path):
    follower = Follower(tmp_path / "x.jsonl")
    assert numbers(follower) == []
    follower.path.write_text(lines(1, 2))
    assert numbers(follower) == [1, 2]
    assert follower.epoch == 0


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_every_line_comes_once_however_the_writes_are_cut(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    whole, follower = lines(*range(6)).encode(), Follower(path)
    path.touch()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
        with path.open("ab") as file:
            file.write(whole[start:end])
        assert numbers(follower) == list(range(whole[:end].count(b"\n")))
    assert follower.epoch == 0


def test_only_new_bytes_are_read(tmp_path):
    follower = Follower(tmp_path / "x.jsonl")
    follower.path.write_text(lines(*range(1000)))
    first = follower.read()
    with follower.path.open("a") as file:
        file.write(lines(1000))
    assert [a is b for a, b in zip(first, follower.read(), strict=False)] == [True] * 1000


def test_resume_replaces_the_file_and_starts_a_new_epoch(tmp_path):
    follower = Follower(tmp_path / "x.jsonl")
    follower.path.write_text(lines(1, 2, 3))
    follower.read()
    write_atomically(follower.path, lines(1, 2))
    assert (numbers(follower), follower.epoch) == ([1, 2], 1)


def test_the_same_file_with_another_last_line_is_read_from_its_start(tmp_path):
    follower = Follower(tmp_path / "x.jsonl")
    follower.path.write_text(lines(1, 2))
    follower.read()
    handle = os.open(follower.path, os.O_WRONLY)
    os.pwrite(handle, lines(1, 7, 8).encode(), 0)
    os.close(handle)
    assert (numbers(follower), follower.epoch) == ([1, 7, 8], 1)


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    follower = Follower(tmp_path / "x.jsonl")
    damaged = ["nonsense", "[1]", '{"n": NaN}', "[" * 100_000, ""]
    Path(follower.path).write_text(lines(1) + "\n".join(damaged) + "\n" + lines(2))
    assert (numbers(follower), follower.broken) == ([1, 2], 5)
