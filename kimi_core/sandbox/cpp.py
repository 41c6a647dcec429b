"""C++ as a second language: compiled in one sandbox, run in others."""

from collections.abc import Callable

from kimi_core.sandbox.pool import run as run_in_default_pool
from kimi_core.sandbox.program import MB, Limits, Result

COMPILE_LIMITS = Limits(
    wall_s=60, cpu_s=30, memory_bytes=1024 * MB, file_bytes=64 * MB, output_bytes=64 * MB
)


def compile_cpp(
    source: str,
    *,
    run: Callable[..., Result] = run_in_default_pool,
    limits: Limits = COMPILE_LIMITS,
) -> Result:
    """Compile one C++17 file with the host's g++, in a sandbox, because the source is hostile.

    If the status is OK, ``stdout`` is the executable, which goes into the next sandbox as a file.
    Nothing but output is ever read from a sandbox. If the source does not compile, the status is
    RUNTIME and ``stderr`` has the messages of g++.

    >>> built = compile_cpp("int main() { return 3; }")  # doctest: +SKIP
    >>> run(["./main"], files={"main": built.stdout}).exit_code  # doctest: +SKIP
    3

    Args:
        run: ``run`` of a Pool.
    """
    command = "g++ -O2 -std=c++17 -o main main.cpp >&2 && cat main"
    files = {"main.cpp": source.encode(errors="surrogatepass")}
    return run(["/bin/sh", "-c", command], files=files, limits=limits)
