"""The master's end of a rollout worker: starts the process, talks to it, sees how it ends."""

import copy
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
from kimi_core.rollout.torch.worker import Start
from kimi_core.types import Request, Sampling

MODULE = "kimi_core.rollout.torch.worker"

START_S = 300.0
"""Seconds that a worker has until it serves: its imports take about 8 CPU-seconds."""

SILENT_S = 20.0
"""Seconds after which a worker counts as hung that has work and says nothing at all."""

END_S = 5.0
"""Seconds that a worker has to end by itself; then it is killed."""


class ProcessWorker:
    """Implements ``Worker`` with a child process that is bound to an arena.

    Args:
        number: of this worker in its fleet.
        start: gives what the process has to know, once a version was published.
        timeout_s: longest time without a decode step while there is work, in seconds.
    """

    def __init__(self, number: int, start: Callable[[], Start], *, timeout_s: float) -> None:
        self.number = number
        self.ready = False
        self.policy_version = -1
        self.steps = 0
        self._start = start
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._heard = self._moved = 0.0

    def start(self) -> None:
        """Start the process, in place of one that is left. It is ``ready`` later."""
        self._kill()
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(SILENT_S), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with theirs:
            self._process = subprocess.Popen(
                # -P: in the repository's root, -m would import the uncompiled folder there.
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # Ctrl-C is meant for the run's process.
            )
        self._connection = Connection(ours.detach())
        self._heard = self._moved = time.monotonic()

    def fileno(self) -> int:
        """What becomes readable when the worker says something or ends."""
        assert self._connection is not None
        return self._connection.fileno()

    def serve(self, version: int) -> None:
        """Have the worker switch to what was published; it is ``ready`` when it has."""
        self.ready = False
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
        """Let the process end by itself. Safe to call twice."""
        self._hang_up()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        self._kill()

    @property
    def _name(self) -> str:
        pid = self._process.pid if self._process else "none"
        return f"Rollout worker {self.number} (pid {pid})"

    def _kill(self) -> None:
        self.ready, self.policy_version, self.steps = False, -1, 0
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._hang_up()

    def _note(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        if message.kind == wire.HELLO:
            self._send(self._start())
        elif message.kind == wire.READY:
            self.ready, self.policy_version = True, message.policy_version
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
        assert self._process is not None
        if isinstance(error, BlockingIOError):
            return f"{self._name} stopped in the middle of a message for {SILENT_S:.0f} s"
        if isinstance(error, ValueError):
            return f"{self._name} sent nonsense: {error}"
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return f"{self._name} closed its connection"
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        return f"{self._name} ended {how}"

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


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
