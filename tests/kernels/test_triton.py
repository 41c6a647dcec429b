"""The Triton kernels without a GPU: interpreted, and compiled for each target."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compile_kernels():
    pytest.importorskip("triton", reason="no Triton for this platform")
    path = ROOT / "benches" / "compile_kernels.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.nightly
def test_interpreted_kernels_agree_with_plain_torch():
    pytest.importorskip("triton", reason="no Triton for this platform")
    file = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


OTHERS = [pytest.param(name, marks=pytest.mark.nightly) for name in ("sm_80", "sm_100", "gfx942")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", *OTHERS])
@pytest.mark.nightly
def test_what_ships_compiles_without_spills(compile_kernels, target, tmp_path, monkeypatch):
    """Registers and shared memory are those kept in benches/baselines; after a change to a kernel
    or to Triton: `python benches/compile_kernels.py --write`."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compile_kernels.resources(target)
    assert max(usage["spilled"] for usage in found.values()) <= compile_kernels.SPILLED
    assert max(u["shared"] for u in found.values()) <= compile_kernels.SHARED_LIMIT[target]
    assert found == json.loads(compile_kernels.KEPT.read_text())[target]


def test_importing_the_kernels_does_not_import_triton(tmp_path):
    script = "import sys, kimi_core.kernels; assert 'triton' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_weight_gradients_of_16_bits_are_summed_in_float32_by_torch():
    """The call that a GPU will see exists, and gives what the sum needs; shapes and dtypes only."""
    tile = torch.empty(8, 32, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(8, 16, dtype=torch.bfloat16, device="meta")
    sums = torch.empty(32, 16, device="meta")
    found = torch.addmm(sums, tile.T, hidden, torch.float32, beta=0, out=sums)
    assert found.dtype == torch.float32 and found.shape == (32, 16)
