"""Waits inside a ready sandbox, reads files and a Python program from stdin, and becomes it.

This text runs as ``python3 -S -c``, not as a module. No hostile code is in the sandbox yet. ``-S``
saves a fifth of Python's start; the parts of the site module that programs use are made here.
``os`` is made of ``posix``, which is loaded already.

A newline on stdout says that it listens. Then stdin has a line ``SIZE NAME`` for each file, of
which the last is the program, an empty line, the contents one after the other, and the stdin of the
program. Nothing is read ahead, so the program finds its stdin untouched.
"""

import builtins
import posix
import sys


def _line() -> str:
    line = b""
    while not line.endswith(b"\n"):
        byte = posix.read(0, 1)
        if not byte:
            raise SystemExit  # The slot has ended.
        line += byte
    return line[:-1].decode()


def _exactly(size: int) -> bytes:
    parts = []
    while size:
        parts.append(posix.read(0, size))
        if not parts[-1]:
            raise SystemExit
        size -= len(parts[-1])
    return b"".join(parts)


def _write(name: str, content: bytes) -> None:
    above = ""
    for folder in name.split("/")[:-1]:
        above += f"{folder}/"
        try:  # noqa: SIM105 - contextlib would have to be imported.
            posix.mkdir(above)
        except FileExistsError:
            pass
    fd = posix.open(name, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC, 0o755)
    while content:
        content = content[posix.write(fd, content) :]
    posix.close(fd)


def _receive() -> tuple[str, bytes]:
    """Write all files below the work folder; return name and content of the last."""
    sizes = []
    while line := _line():
        digits, name = line.split(" ", 1)
        sizes.append((int(digits), name))
    for size, name in sizes:
        content = _exactly(size)
        _write(name, content)
    return name, content


def _show(kind, error, trace) -> None:  # type: ignore[no-untyped-def]
    """Print an uncaught exception without the frames of this file."""
    while trace and trace.tb_frame.f_code.co_filename == "<string>":
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def _add_site() -> None:
    version = f"{sys.base_prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    debian = version.replace("/usr/", "/usr/local/", 1) + "/dist-packages"
    packages = ["/opt/packages"]  # Bound there by bubblewrap.py: numpy.
    sys.path += [f"{version}/site-packages", debian, "/usr/lib/python3/dist-packages", *packages]
    builtins.exit = builtins.quit = _quit  # type: ignore[assignment]


def _quit(code=None) -> None:  # type: ignore[no-untyped-def]
    """``exit()`` and ``quit()`` of the site module."""
    raise SystemExit(code)


def _become() -> None:
    _add_site()
    sys.set_int_max_str_digits(0)  # Solutions print numbers of any length.
    posix.write(1, b"\n")  # Ready.
    name, source = _receive()
    sys.argv[:] = [name]
    sys.excepthook = _show
    module = sys.modules["__main__"] = type(sys)("__main__")
    module.__file__ = name
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)


_become()
