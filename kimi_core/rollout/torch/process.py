"""The master's end of rollout workers: starts them, talks to them, sees how they end."""

import copy
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PreTrainedModel

from kimi_core.rollout import wire
from kimi_core.rollout.fleet import WorkerGone
from kimi_core.rollout.torch.worker import RUNS, Start
from kimi_core.types import Request, Sampling

MODULE = "kimi_core.rollout.torch.worker"

START_S = 300.0
"""Seconds until a worker serves. The imports of the nursery take about 8 CPU-seconds."""

SILENT_S = 20.0
"""Seconds after which a worker counts as hung that has work and says nothing at all."""

END_S = 5.0
"""Seconds that the nursery has to end, or to say how a worker ended."""


class Nursery:
    """The process that forks workers; started when the first is wanted, or when it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self, connection: socket.socket) -> None:
        """Have a worker forked that is at this end of a connection; it says ``HELLO`` there."""
        if self._control is not None:
            with suppress(OSError):
                socket.send_fds(self._control, [b"fork"], [connection.fileno()])
                return
        self.close()
        self._start()
        assert self._control is not None
        socket.send_fds(self._control, [b"fork"], [connection.fileno()])

    def status(self, pid: int) -> int:
        """The exit status of a worker that ends, negative for a signal; ``RUNS``: not known."""
        if self._control is None:
            return RUNS
        try:
            self._control.send(str(pid).encode())
            return int(self._control.recv(32) or RUNS)
        except OSError:
            return RUNS

    def close(self) -> None:
        """End it, and so all workers. Safe to call twice."""
        if self._control is not None:
            self._control.close()
        self._control = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(END_S)
        with theirs:
            self._process = subprocess.Popen(
                # -P: in the repository's root, -m would import the uncompiled folder there.
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # Ctrl-C is meant for the run's process.
            )
        self._control = ours


class ProcessWorker:
    """Implements ``Worker`` with a process that is bound to an arena.

    Args:
        number: of this worker in its fleet.
        nursery: forks the process.
        start: gives what the process has to know, once a version was published.
        timeout_s: longest time without a decode step while there is work, in seconds.
    """

    def __init__(
        self, number: int, nursery: Nursery, start: Callable[[], Start], *, timeout_s: float
    ) -> None:
        self.number = number
        self.pid = 0
        """0: it has not started."""
        self.ready = False
        self.policy_version = -1
        self.steps = 0
        self._nursery = nursery
        self._start = start
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._answers = 0
        """How often it is still to say that it serves a version."""
        self._heard = self._moved = 0.0

    def start(self) -> None:
        """Start the process, in place of one that is left. It is ``ready`` later."""
        self.close()
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(SILENT_S), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with theirs:
            self._nursery.fork(theirs)
        self._connection = Connection(ours.detach())
        self._answers = 1
        self._heard = self._moved = time.monotonic()

    def fileno(self) -> int:
        """What becomes readable when the worker says something or ends."""
        assert self._connection is not None
        return self._connection.fileno()

    def serve(self, version: int) -> None:
        """Have the worker switch to what was published; it is ``ready`` when it has."""
        self.ready = False
        if self.pid:  # Otherwise it starts with the newest version.
            self._answers += 1
            self._ask(("serve", version))

    def begin(self, call: int, sampling: Sampling, most_steps: int) -> None:
        """Announce a call: what is fed from now on belongs to it."""
        self._ask(("begin", call, sampling, most_steps))

    def feed(self, requests: Sequence[Request]) -> None:
        """Give the worker more to do."""
        self._ask(("feed", list(requests)))

    def stop(self) -> None:
        """Have the worker give up what it was fed."""
        self._ask(("stop",))

    def take(self) -> list[wire.Message]:
        """What the worker has said since the last call. Raises WorkerGone."""
        assert self._connection is not None
        said = []
        try:
            while self._connection.poll():
                said.append(wire.unpacked(self._connection.recv_bytes(), self.number))
        except EOFError as error:
            if not said:  # Otherwise the next call finds the end.
                raise WorkerGone(self._how_it_ended(error)) from error
        except (OSError, ValueError) as error:
            raise WorkerGone(self._how_it_ended(error)) from error
        for message in said:
            self._note(message)
        return said

    def check(self) -> None:
        """Raise WorkerGone if the worker has work and is silent, or makes no step, for too long."""
        now = time.monotonic()
        silent, limit = now - self._heard, SILENT_S if self.policy_version >= 0 else START_S
        if silent > limit:
            raise WorkerGone(f"{self._name} said nothing for {silent:.0f} s")
        if now - self._moved > max(self._timeout_s, limit):
            raise WorkerGone(f"{self._name} made no step for {now - self._moved:.0f} s")

    def close(self) -> None:
        """End the process. Safe to call twice."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        if self.pid:
            with suppress(ProcessLookupError):  # The nursery has asked how it ended.
                os.kill(self.pid, signal.SIGKILL)
            self._nursery.status(self.pid)
        self.ready, self.policy_version, self.steps, self.pid = False, -1, 0, 0

    @property
    def _name(self) -> str:
        return f"Rollout worker {self.number} (pid {self.pid or 'not known'})"

    def _note(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        if message.kind == wire.HELLO:
            self.pid = message.steps
            self._send(self._start())
            return
        if message.kind == wire.READY:
            self._answers -= 1
            self.ready, self.policy_version = self._answers == 0, message.policy_version
        if message.kind == wire.READY or message.segments or message.steps > self.steps:
            self._moved = self._heard
        self.steps = max(self.steps, message.steps)

    def _ask(self, question: tuple[Any, ...]) -> None:
        self._heard = self._moved = time.monotonic()  # It may have had nothing to do until now.
        self._send(question)

    def _send(self, thing: Any) -> None:
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps(thing))
        except OSError as error:
            raise WorkerGone(self._how_it_ended(error)) from error

    def _how_it_ended(self, error: Exception) -> str:
        if isinstance(error, BlockingIOError):
            return f"{self._name} stopped in the middle of a message for {SILENT_S:.0f} s"
        if isinstance(error, ValueError):
            return f"{self._name} sent nonsense: {error}"
        status = self._nursery.status(self.pid) if self.pid else RUNS
        if status == RUNS:
            return f"{self._name} closed its connection"
        name, self.pid = self._name, 0  # The number may be another process's from now on.
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        return f"{name} ended {how}"


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree with the same buffers and, as parameters, placeholders of 0 bytes.

    It can be pickled, and ``bind`` gives it weights.
    """
    placeholders = {
        id(parameter): torch.nn.Parameter(
            torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, placeholders).eval()
