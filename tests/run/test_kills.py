"""``kill -9`` of whole runs at random moments: what they leave has the bits of an unbroken run."""

import json
import os
from pathlib import Path

import pytest
from warm import Warm

from kimi_core.evaluation.progress import sealed_line
from kimi_core.run import state

KILLS = Path(__file__).parents[1] / "kills.py"


def kill(*arguments: str) -> dict:
    path = os.pathsep.join([str(KILLS.parent), os.environ.get("PYTHONPATH", "")])
    process = Warm([KILLS, *arguments], env=os.environ | {"PYTHONPATH": path.strip(os.pathsep)})
    output, errors = process.communicate()
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    print(output)
    return json.loads(output)


@pytest.mark.nightly
def test_many_killed_runs_end_with_the_same_bits():
    counts = kill("--kills", "100", "--seed", "1")
    assert counts["kills"] >= 100
    missed = {"sft", "rollout", "reward", "training", "save", "disk", "evaluation", "checkpoint"}
    assert missed <= counts["in"].keys()


@pytest.mark.nightly
def test_so_do_runs_whose_processes_are_new_interpreters():
    assert kill("--kills", "2", "--seed", "2", "--fresh")["kills"] >= 2


def test_the_rollout_note_is_not_believed_where_it_does_not_fit(tmp_path):
    buffer = tmp_path / "buffer.bin"
    note = tmp_path / state.ROLLOUT
    assert state._steps_of_whole_rollout(buffer, 3, 100) is None
    for text in (b"", b"[1]", b'{"iteration": 3, "tokens": 100, "decode_steps": 7}', b"\xff\xfe"):
        note.write_bytes(text)
        assert state._steps_of_whole_rollout(buffer, 3, 100) is None
    noted = {"iteration": 3, "tokens": 100, "decode_steps": 7}
    note.write_text(sealed_line(noted))
    assert state._steps_of_whole_rollout(buffer, 3, 100) == 7
    assert state._steps_of_whole_rollout(buffer, 4, 100) is None
    assert state._steps_of_whole_rollout(buffer, 3, 99) is None
    note.write_text(sealed_line(noted).replace("7}", "5}"))
    assert state._steps_of_whole_rollout(buffer, 3, 100) is None
