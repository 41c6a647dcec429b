"""Python processes that start with everything imported, for tests that start and kill many.

To import torch, transformers and kimi_core takes 8 CPU-seconds, and a tiny run takes one. A server
imports them once and forks for each process. A fork has a pid, streams and an exit status like any
other process, and knows nothing of pytest.
"""

import multiprocessing as mp
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["kimi_core.run.run", "kimi_core.run.curves", "transformers.models.llama.modeling_llama"]
)


class Warm:
    """``python ARGUMENTS...``, as far as ``subprocess.Popen`` with pipes for all streams."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path | str = ".",
        env: Mapping[str, str] = os.environ,
    ) -> None:
        child_in, our_in = FORKS.Pipe(duplex=False)
        (our_out, child_out), (our_err, child_err) = FORKS.Pipe(False), FORKS.Pipe(False)
        streams = [child_in, child_out, child_err]
        given = (list(map(str, arguments)), str(Path(cwd).resolve()), dict(env), streams)
        self._process = FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()
        for stream in streams:
            stream.close()
        self.stdin = os.fdopen(_detached(our_in), "w")
        self.stdout = os.fdopen(_detached(our_out))
        self.stderr = os.fdopen(_detached(our_err))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"Process {self.pid} has not ended after {timeout} s")
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Safe to call twice."""
        with suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote. It is killed after ``timeout`` seconds."""
        self.stdin.close()
        with ThreadPoolExecutor(2) as readers:
            output, errors = (readers.submit(one.read) for one in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise
            return output.result(), errors.result()


def _detached(connection: Connection) -> int:
    copy = os.dup(connection.fileno())
    connection.close()
    return copy


def _run(
    arguments: list[str], cwd: str, environment: dict[str, str], streams: list[Connection]
) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = os.fdopen(0)
    # A shell without job control lets its background jobs ignore SIGINT, and children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
