"""Processes that answer questions, for work that may hang, die or take all memory."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

START_S = 120.0
"""Seconds that a worker may take to start. Its imports take one CPU second, and much more by the
clock on a busy machine."""

END_S = 10.0
"""Seconds that a worker may take to end; then it is killed."""


PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent ends."""

FOREVER_S = 1e6
"""The system call that waits takes no more than 24 days."""


class Silent(RuntimeError):
    """A worker has died, or not answered in time."""


class Workers:
    """Worker processes, as many as threads ask at the same time; thread-safe.

    A worker is ``python -m MODULE SOCKET_FD ARGUMENTS…``. It sends one message when it is ready,
    and then a reply to each message. It ends when the connection ends. Each starts when it is first
    needed, and has ``start_s`` seconds to be ready.
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), *, start_s: float = START_S
    ) -> None:
        self._module = module
        self._arguments = list(arguments)
        self._start_s = start_s
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._lock = threading.Lock()

    def greeting(self) -> Any:
        """What a worker says when it is ready, from JSON. Raises Silent if it does not start."""
        worker = self._take()
        try:
            greeting = worker.ready()
        except BaseException:
            self._drop(worker)
            raise
        self._give_back(worker)
        return greeting

    def ask(self, message: bytes, deadline_s: float) -> Any:
        """The reply of an idle or a new worker, from JSON.

        Raises:
            Silent: it died, or did not answer in ``deadline_s``. It is gone then.
        """
        worker = self._take()
        try:
            reply = worker.ask(message, deadline_s)
        except BaseException:  # After Ctrl-C too: the next question would get this answer.
            self._drop(worker)
            raise
        self._give_back(worker)
        return reply

    def close(self) -> None:
        """End all workers; another question starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
            busy, self._busy = self._busy, set()
        for worker in busy:
            worker.kill()
        for worker in idle:
            worker.end()

    def _take(self) -> "_Worker":
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker(self._module, self._arguments, self._start_s)
        with self._lock:
            self._busy.add(worker)
        return worker

    def _give_back(self, worker: "_Worker") -> None:
        with self._lock:
            if worker in self._busy:  # Otherwise ``close`` has killed it.
                self._busy.remove(worker)
                self._idle.append(worker)

    def _drop(self, worker: "_Worker") -> None:
        with self._lock:
            if worker not in self._busy:  # ``close`` kills it: two threads must not free one file.
                return
            self._busy.remove(worker)
        worker.kill()


class _Worker:
    """A worker process; it answers one question at a time."""

    def __init__(self, module: str, arguments: Sequence[str], start_s: float) -> None:
        self._start_s = start_s
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: in the repository's root, -m would import the uncompiled folder there.
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for us, and we end the workers.
            )
        self._connection = Connection(ours.detach())
        self._greeting: Any = None

    def ready(self) -> Any:
        """Wait until it has started. Raises Silent."""
        if self._greeting is None:
            self._greeting = self._receive(self._start_s)
        return self._greeting

    def ask(self, message: bytes, deadline_s: float) -> Any:
        """The worker's reply. Raises Silent."""
        self.ready()
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise Silent(self._how_it_ended()) from error
        return self._receive(deadline_s)

    def end(self) -> None:
        """Let the process end by itself."""
        self._connection.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process and those that it has started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _receive(self, deadline_s: float) -> Any:
        try:
            if self._connection.poll(min(deadline_s, FOREVER_S)):
                return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Silent(self._how_it_ended()) from error
        raise Silent(f"did not return in {deadline_s:g} s")

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status >= 0:
            return f"ended its process with status {status}"
        return f"ended its process by {signal.Signals(-status).name}"
