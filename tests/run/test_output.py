"""What a command prints goes on without a reader."""

import os
import subprocess
import sys
from pathlib import Path

import kimi_core

CODE = """if True:
    import subprocess, sys
    from kimi_core.run.output import keep_output
    keep_output()
    keep_output()
    print("begun", flush=True)
    sys.stdin.read()  # Until the reader has gone.
    for stream in (sys.stdout, sys.stderr):
        for _ in range(1000):
            print("x" * 1000, file=stream)
        stream.flush()
    done = subprocess.run([sys.executable, "-c", "print('y' * 100000)"])
    raise SystemExit(done.returncode + 7)
"""


def begin(code: str) -> subprocess.Popen:
    root = str(Path(kimi_core.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )


def test_a_reader_that_goes_away_ends_nothing():
    process = begin(CODE)
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 7


def test_a_reader_that_stays_gets_everything():
    process = begin(CODE)
    said, complaints = process.communicate("")
    assert said == "begun\n" + ("x" * 1000 + "\n") * 1000 + "y" * 100_000 + "\n"
    assert complaints == ("x" * 1000 + "\n") * 1000
    assert process.returncode == 7
