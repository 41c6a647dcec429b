"""A run on a GPU: it trains in bfloat16, stops, goes on, and leaves what a run on a CPU leaves.

``benches/gpu.sh`` runs this and everything else that needs a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kimi_core
from kimi_core.metrics import read_metrics

ROOT = Path(__file__).parents[2]

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


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["replicas=1", "tensor_parallel=2", "context_parallel=2"])
def test_two_ranks_over_nccl_train_as_one_process(tmp_path, axis):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: a rank has one of its own")
    settings = (*SETTINGS[1:], "model.dtype=float32", "iterations=2")
    train(tmp_path, *settings, "name=one")
    train(tmp_path, *settings, "name=two", "trainer.ranks=2", f"trainer.{axis}")
    one, two = (
        read_metrics(tmp_path / "runs" / name / "metrics.jsonl")[0] for name in ("one", "two")
    )
    assert one[0].loss == pytest.approx(two[0].loss, rel=1e-4)
    assert one[0].grad_norm == pytest.approx(two[0].grad_norm, rel=1e-3)


def test_the_script_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = [str(ROOT / "benches" / "gpu.sh"), str(tmp_path / "out")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        script, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "No CUDA GPU" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout
