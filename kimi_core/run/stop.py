"""Ctrl-C and SIGTERM: a run finishes what it is at, saves it, and says how to go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)


SAID = b"stopping as soon as this step is saved; a second signal interrupts at once\n"


class Stopped(KeyboardInterrupt):
    """A signal has ended the run. The message says how far it came and how to go on."""

    way_on = "--resume goes on"
    """What the user has to do; a command without ``--resume`` sets another text."""

    def __init__(self, signum: int, how_far: str) -> None:
        super().__init__(how_far)
        self.how_far = how_far
        self.status = 128 + signum
        """Exit status of the process: 130 after Ctrl-C, 143 after SIGTERM."""

    def __str__(self) -> str:
        return f"{self.how_far}; {self.way_on}"


class Stop:
    """Whether a signal has asked the run to stop, and which one."""

    signum: int | None = None

    def is_set(self) -> bool:
        return self.signum is not None

    def leave(self, what: str) -> None:
        """Raise ``Stopped``, if a signal came, with "stopped at ``what``; --resume goes on"."""
        if self.signum is not None:
            raise Stopped(self.signum, f"stopped at {what}")


@contextmanager
def stop_on_signals(grace_s: float) -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM set the ``Stop``, and say so; a second interrupts at once.

    ``grace_s`` seconds after SIGTERM, the run is interrupted as if by a second one.
    """
    stop = Stop()
    if current_thread() is not main_thread():
        yield stop  # Only the main thread may handle signals.
        return
    timers: list[Timer] = []

    def request_stop(signum: int, _: Any) -> None:
        if stop.is_set():
            raise Stopped(signum, "interrupted after the last saved state")
        stop.signum = signum
        os.write(2, SAID)  # A handler may interrupt a print, and must not print itself.
        if signum == signal.SIGTERM:
            timers.append(Timer(grace_s, os.kill, (os.getpid(), signum)))
            timers[-1].daemon = True
            timers[-1].start()

    previous = {one: signal.signal(one, request_stop) for one in HANDLED}
    try:
        yield stop
    finally:
        for timer in timers:
            timer.cancel()
        for one, handler in previous.items():
            signal.signal(one, handler)
