"""200 iterations: memory, descriptors and disk stay as they are after the first ones."""

import os
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core.loop import Loop
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train

ITERATIONS = 200
WARM = 50
"""Iterations after which allocators and caches have what they need."""


def in_use(folder: Path) -> tuple[float, int, int]:
    """Resident memory in MB, open descriptors, bytes of the newest state and the buffer."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    kept = [*max(folder.glob("states/*")).iterdir(), folder / "buffer.bin"]
    size = sum(path.stat().st_size for path in kept if path.is_file())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), size


@pytest.mark.nightly
def test_200_iterations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    settings = [f"iterations={ITERATIONS}", "rollout.token_budget=3", "evaluation.every=20"]
    plain, rows = Loop.iterate, []

    def measured(loop):
        rows.append(in_use(tmp_path / "runs" / "think"))
        return plain(loop)

    monkeypatch.setattr(Loop, "iterate", measured)
    train(load_config("tiny.toml", settings), console=Console(file=StringIO()))
    memory_mb, descriptors, disk = np.array(rows)[WARM:].T
    at = np.arange(len(memory_mb))
    slope_kb = 1e3 * np.polyfit(at, memory_mb, 1)[0]
    slope_bytes = np.polyfit(at, disk, 1)[0]
    print(
        f"iterations {WARM} to {ITERATIONS}: memory {memory_mb[0]:.1f} to {memory_mb[-1]:.1f} MB "
        f"({slope_kb:+.1f} kB an iteration), descriptors {descriptors.min():.0f} to "
        f"{descriptors.max():.0f}, state and buffer {disk.min():.0f} to {disk.max():.0f} bytes "
        f"({slope_bytes:+.1f} an iteration)"
    )
    # The report keeps each record; a state has the rates of all prompts that were ever drawn.
    # A kept state or copy of the weights would be hundreds of kB; the allocator moves by 3 MB.
    assert slope_kb < 50
    assert descriptors.max() <= descriptors.min() + 1  # A state may be on its way to the disk.
    assert abs(slope_bytes) < 100
