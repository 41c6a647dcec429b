"""The process of a user's reward function: ``python -m … SOCKET_FD SPEC FOLDER SYS_PATH``.

It says ``{"way": …}`` when the file is imported, or ``{"error": …}``. Each message is a pickle of
``(responses, workers, timeout_s)``. The reply is a list of ``["score", value, parts, note]``,
``["none", reason]`` or ``["limit", reason]``, or ``{"error": …}``.
"""

import ctypes
import json
import os
import pickle
import select
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kimi_core.plugins import load_function
from kimi_core.reward.base import LimitReached, RewardError, RewardFunction, place_of
from kimi_core.reward.calls import (
    Response,
    Verdict,
    call_async,
    call_batch,
    call_one,
    way_of,
)
from kimi_core.reward.workers import END_S, PR_SET_PDEATHSIG
from kimi_core.types import Score

PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: descendants whose parent has ended become children of this process."""


def main() -> None:
    """Serve until the connection ends."""
    connection, spec, folder = Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3]
    _supervise(connection)
    sys.path[:] = json.loads(sys.argv[4])
    own = os.getpid()
    function: Any = None
    greeting: dict[str, str]
    try:
        function = load_function(spec, folder)
        greeting = {"way": way_of(function)}
    except ValueError as error:
        greeting = {"error": str(error)}
    except BaseException as error:  # noqa: BLE001 - the file may raise anything.
        greeting = {"error": f"{spec} raised {type(error).__name__}: {error}{place_of(error)}"}
    try:
        _end_unless(own)
        connection.send_bytes(json.dumps(greeting).encode())
        while True:
            responses, workers, timeout_s = pickle.loads(connection.recv_bytes())
            reply = _reply(function, responses, workers, timeout_s)
            _end_unless(own)
            connection.send_bytes(json.dumps(reply).encode())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        close = getattr(function, "close", None)
        if close is not None:
            close()


def _supervise(connection: Connection) -> None:
    """Fork, and return in the child. The parent ends the child when the run is gone.

    The child may be in a call that never returns, and so not see that its connection has ended.
    What it has started and left behind ends with it.
    """
    supervisor = os.getpid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == supervisor:
            return
        os._exit(1)
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    either = select.poll()
    either.register(os.pidfd_open(child), select.POLLIN)
    either.register(connection, select.POLLHUP)
    either.poll()
    if not ended.poll(END_S * 1000):
        _end_children()
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _end_children()
    if code < 0:
        if code != -signal.SIGKILL:  # Nobody can catch that one.
            signal.signal(-code, signal.SIG_DFL)
        os.kill(supervisor, -code)
    os._exit(code)


def _end_unless(own: int) -> None:
    """End a child that the user's code has forked, and that has returned as its parent does."""
    if os.getpid() != own:
        os._exit(0)


def _end_children() -> None:
    """Kill all children, also those that were inherited from a child that has ended."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.exists() and (pids := children.read_text().split()):
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


def _reply(
    function: RewardFunction, responses: Sequence[Response], workers: int, timeout_s: float
) -> Any:
    try:
        way = way_of(function)
        if way == "batch":
            found = call_batch(function, responses)
        elif way == "async":
            found = call_async(function, responses, workers, timeout_s)
        else:
            found = [call_one(function, one) for one in responses]
        return [_written(one) for one in found]
    except RewardError as error:
        return {"error": str(error)}
    except BaseException as error:  # noqa: BLE001 - such as SystemExit
        return {"error": f"Reward function raised {type(error).__name__}: {error}"}


def _written(verdict: Verdict) -> list[Any]:
    if isinstance(verdict, Score):
        return ["score", verdict.value, dict(verdict.parts), verdict.note]
    return ["limit" if isinstance(verdict, LimitReached) else "none", str(verdict)]


if __name__ == "__main__":
    main()
