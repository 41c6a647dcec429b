"""``kimi_core.sandbox.run`` without a sandbox, for programs that the tests wrote themselves.

So the rules of the reward and the service are tested on machines without bubblewrap too; the files
beside this one test them in the sandbox where there is one.
"""

import errno
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kimi_core.sandbox import Limits, Result, Status


def plain_run(
    program: str | Sequence[str],
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes] | None = None,
    limits: Limits | None = None,
) -> Result:
    limits = limits or Limits()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (files or {}).items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755)
        argv = program
        if isinstance(program, str):
            Path(folder, "main.py").write_text(program)
            argv = [sys.executable, "-I", "main.py"]
        try:
            done = _run(argv, stdin, folder, limits.wall_s)
        except subprocess.TimeoutExpired:
            return result(Status.TIME, exit_code=None)
    status = Status.RUNTIME if done.returncode else Status.OK
    if len(done.stdout) > limits.output_bytes:
        status = Status.OUTPUT
    kept = done.stdout[: limits.output_bytes]
    return result(status, kept, done.stderr, exit_code=done.returncode)


def _run(argv: Sequence[str], stdin: bytes, folder: str, wall_s: float):
    while True:
        try:
            return subprocess.run(
                argv,
                input=stdin,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                capture_output=True,
                timeout=wall_s,
                check=False,
            )
        except OSError as error:
            # A fork of another thread may still hold the file open for writing.
            if error.errno != errno.ETXTBSY:
                raise


def result(
    status: Status, stdout: bytes = b"", stderr: bytes = b"", *, exit_code: int | None = 0
) -> Result:
    return Result(status, exit_code, stdout, stderr, cpu_s=0.0, wall_s=0.0, memory_bytes=0)
