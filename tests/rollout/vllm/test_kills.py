"""``kill -9`` of a whole run with vLLM: each acknowledged token stays, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
