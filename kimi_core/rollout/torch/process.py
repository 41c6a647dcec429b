"""The master's end of rollout workers: starts them, talks to them, sees how they end."""

import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from kimi_core.models.vision import Images
from kimi_core.rollout import wire
from kimi_core.rollout.connected import ConnectedWorker
from kimi_core.rollout.torch.worker import RUNS, Start

RECORDERS = "transformers.utils.output_capturing"

MODULE = "kimi_core.rollout.torch.worker"

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


class ProcessWorker(ConnectedWorker):
    """Implements ``Worker`` with a process of this host that is bound to an arena.

    Args:
        number: of this worker in its fleet.
        nursery: forks the process.
        start: gives what the process has to know, once a version was published.
        timeout_s, images: as for ``ConnectedWorker``.
    """

    joins = False

    def __init__(
        self,
        number: int,
        nursery: Nursery,
        start: Callable[[], Start],
        *,
        timeout_s: float,
        images: Images | None = None,
    ) -> None:
        super().__init__(number, timeout_s=timeout_s, silent_s=SILENT_S, images=images)
        self.pid = 0
        """0: it has not started."""
        self._nursery = nursery
        self._start = start

    @property
    def name(self) -> str:
        return f"Rollout worker {self.number} (pid {self.pid or 'not known'})"

    def start(self) -> None:
        """Start the process, in place of one that is left. It is ``ready`` later."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._nursery.fork(theirs)
        self.connected(ours)

    def serve(self, version: int) -> None:
        """Have the worker switch to what was published; it is ``ready`` when it has."""
        self.ready = False
        if self.pid:  # Otherwise it starts with the newest version.
            super().serve(version)

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self.disconnect()
        if self.pid:
            with suppress(ProcessLookupError):  # The nursery has asked how it ended.
                os.kill(self.pid, signal.SIGKILL)
            self._nursery.status(self.pid)
        self.pid = 0

    def note(self, message: wire.Message) -> None:
        super().note(message)
        if message.kind == wire.HELLO:
            self.pid = message.steps
            self.send(pickle.dumps(self._start()))

    def encode(self, question: tuple[Any, ...]) -> bytes:
        return pickle.dumps(question)

    def how_it_ended(self) -> str:
        status = self._nursery.status(self.pid) if self.pid else RUNS
        if status == RUNS:
            return f"{self.name} closed its connection"
        name, self.pid = self.name, 0  # The number may be another process's from now on.
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
    made = copy.deepcopy(model, placeholders).eval()
    for part in made.modules():
        # What records the outputs of a vision tower cannot be pickled; it is put there again.
        part.__dict__.pop("_output_capturing_hooks_installed", None)
        hooks = part._forward_hooks
        for key in [key for key, one in hooks.items() if one.__module__ == RECORDERS]:
            del hooks[key]
    return made
