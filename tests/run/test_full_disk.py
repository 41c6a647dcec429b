"""Disks that are full, read-only or gone while a run writes: one line says the way out, and the
same command then ends with the bits of a run that nothing stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import full_disk
import pytest


def namespace() -> list[str]:
    """A command prefix that may mount; its mounts go when its process does."""
    prefix = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--mount"]
    probe = [*prefix, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs here")
    return prefix


@pytest.mark.nightly
def test_every_kind_of_write(tmp_path):
    command = [*namespace(), sys.executable, full_disk.__file__, str(tmp_path)]
    path = os.pathsep.join([str(Path(full_disk.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == len(full_disk.WRITES) + 8
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome['said']}")
        said = full_disk.FAULTS[name.split()[0]][2]
        assert outcome["status"] == 1 and not outcome["traceback"], (name, outcome)
        assert said in outcome["said"] and "--resume" in outcome["said"], (name, outcome)
        assert outcome["after"] == 0 and outcome["differ"] == [], (name, outcome)
    left = {path.parts[-3] for path in Path(tmp_path).glob("*/runs/*")}
    assert left == {"unbroken"}  # Every tmpfs is gone, and nothing was written under one.
