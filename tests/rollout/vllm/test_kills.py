"""``kill -9`` of a whole run with vLLM: each acknowledged token stays, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_testing import MARKS

pytestmark = MARKS
TESTS = Path(__file__).parents[2]


def test_a_killed_run_with_vllm_loses_and_doubles_nothing():
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, TESTS / "kills_vllm.py", "--kills", "1", "--seed", "3"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 1 and counts["tokens"] > 0 and not counts["wrong"]


@pytest.mark.parametrize(
    ("acknowledged", "said"),
    [
        ([[7, 0, [4, 5], [-1.0, -2.0]], [7, 2, [6], [-3.0]]], []),
        ([[7, 0, [4, 5], [-1.0, -2.0]], [7, 1, [5], [-2.0]]], ["acknowledged twice: [(7, 1)]"]),
        ([[7, 1, [4], [-2.0]]], ["response 7 has other tokens from 1 on"]),
        ([[7, 1, [5], [-2.1]]], ["response 7 has other tokens from 1 on"]),
        ([[7, 2, [6, 6], [-3.0, -3.0]]], ["response 7 has other tokens from 2 on"]),
        ([[8, 0, [4], [-1.0]]], ["response 8 is gone"]),
    ],
)
def test_lost_doubled_and_changed_tokens_are_found(tmp_path, acknowledged, said):
    from kills_vllm import _lost

    path = tmp_path / "acknowledged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in acknowledged))
    assert _lost(path, {7: ([4, 5, 6], [-1.0, -2.0, -3.0])}) == said
