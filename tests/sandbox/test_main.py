"""The sandbox from the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WEAK = [] if os.geteuid() == 0 else ["--allow-weak"]


def shell(*arguments: str, stdin: bytes = b"", **kwargs: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kimi_core.sandbox", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, **kwargs)


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "double.py"
    path.write_text("import sys\nprint(2 * int(input()), sys.argv[1:])")
    return str(path)


def test_run_a_python_file(bwrap: None, program: str) -> None:
    done = shell("run", *WEAK, program, "a", "--b", stdin=b"21\n")
    assert (done.returncode, done.stdout) == (0, b"42 ['a', '--b']\n"), done.stderr
    assert done.stderr.startswith(b"OK: ") and b"MB" in done.stderr


def test_run_as_json(bwrap: None, program: str) -> None:
    done = shell("run", *WEAK, "--json", program, stdin=b"x")
    values = json.loads(done.stdout)
    assert (values["status"], values["exit_code"]) == ("RUNTIME", 1)
    assert "ValueError" in values["stderr"]
    assert done.returncode != 0


def test_run_a_command_until_its_time_is_over(bwrap: None) -> None:
    done = shell("run", *WEAK, "--time", "0.5", "sleep", "1000")
    assert done.returncode != 0
    assert done.stderr.startswith(b"TIME (wall-clock time of 0.5 s)")


def test_limits_out_of_range_are_errors() -> None:
    done = shell("run", "--time", "0", "true")
    assert done.returncode == 2
    assert b"error: Limits: wall_s = 0.0; allowed is any positive number" in done.stderr


def test_check(bwrap: None) -> None:
    done = shell("check")
    assert b"holds    no network" in done.stdout
    assert done.returncode == (1 if b"MISSING" in done.stdout else 0)
