"""``kimi replay``: an iteration done again is equal, and a change of the record is found."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core import cli
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("work")
    (work / "tiny.toml").write_text(TINY)
    settings = [f"runs={work}", "rollout.token_budget=5", "iterations=3", "sft.steps=2"]
    return train(load_config(work / "tiny.toml", settings), console=Console(file=StringIO()))


def replay(run: Path, iteration: int, capsys) -> tuple[int, str]:
    status = cli.main(["replay", str(run), "--iteration", str(iteration)])
    found = capsys.readouterr()
    return status, found.out + found.err


def test_it_is_equal_and_a_changed_record_is_not(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, said = replay(run, 3, capsys)
    assert status == 0 and said.endswith("equal\n"), said
    assert re.search(r"metrics: \d+ equal\nresponses: \d+ equal\nweights: \d+ equal", said)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    path = run / "trajectories" / "000003.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first["token_ids"][1] += 1
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    status, said = replay(run, 3, capsys)
    path.write_bytes(before[path])
    assert status == 1 and "responses, 0, token_ids, 1: " in said and "not equal" in said

    path.write_text("\n".join([lines[0][:-9], *lines[1:]]) + "\n")
    status, said = replay(run, 3, capsys)
    path.write_bytes(before[path])
    assert status == 2 and f"{path} is damaged" in said and "remove it" in said


def test_a_state_that_is_gone_is_named(run, capsys):
    status, said = replay(run, 2, capsys)  # The last evaluation is good.
    assert status == 2 and "has those for 3, 4. Raise keep_states" in said
    status, said = replay(run / "nothing", 1, capsys)
    assert status == 2 and "is not the folder of a run" in said
