"""Standard output and error of a command, whose readers may go away."""

import io
import os
import sys
from typing import Any


class Kept(io.FileIO):
    """A stream that goes on without its reader: what is written after that is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # Processes that start later write there, too.
            os.close(nowhere)
            return len(memoryview(data))


def keep_output() -> None:
    """Let a run go on if a reader of what it prints ends, as in ``kimi train | head``.

    Does nothing to streams that are replaced already, as by a test or a notebook. Safe to call
    twice.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = io.BufferedWriter(Kept(stream.fileno(), "w", closefd=False))
        kept = io.TextIOWrapper(
            raw,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, kept)
