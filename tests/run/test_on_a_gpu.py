"""A run on a GPU: it trains in bfloat16, stops, goes on, and leaves what a run on a CPU leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_core
from kimi_core.metrics import read_metrics

pytestmark = pytest.mark.gpu

SETTINGS = (
    "name=gpu",
    "model.device=cuda",
    "sft.steps=60",
    "prompts.held_out=50",
    "evaluation.prompts=50",
    "rollout.prompts_per_iteration=8",
)


def train(work: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(Path(kimi_core.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "kimi_core.cli", "train", *arguments],
        cwd=work,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_on_a_gpu_goes_on(tmp_path, dtype):
    settings = (*SETTINGS, f"model.dtype={dtype}")
    train(tmp_path, *settings, "iterations=2")
    train(tmp_path, *settings, "iterations=4", "--resume")
    iterations, evaluations = read_metrics(tmp_path / "runs" / "gpu" / "metrics.jsonl")
    assert [line.iteration for line in iterations] == [1, 2, 3, 4]
    assert evaluations[-1].n == 50
    # Engine and trainer compute the same log-probs by different kernels.
    limit = 0.1 if dtype == "bfloat16" else 1e-3
    assert max(line.logprob_gap_mean for line in iterations) < limit
