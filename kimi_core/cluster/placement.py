"""What Ray places on the hosts of its cluster: rollout workers, and ranks of the trainer.

A **rollout worker** is started again when it ends:

1. The run connects to the cluster at ``cluster.address``, and listens as with ``cluster.listen``.
2. Ray starts an actor for each of ``rollout.workers``: a process in which ``worker.py`` has one
   session with the run. Tokens and weights go between worker and run, and never through Ray.
3. When a session ends, so does the actor's process, whatever the reason. Ray starts the actor
   again, on any host that has room, and the worker joins at the version of that time.
4. When the run ends, Ray ends its actors.

A **rank of the trainer** above 0 is an actor that starts a process, a follower. When one ends, so
does the training phase (``trainer/ranks.py``). Ray does not start it again, because a rank cannot
join in the middle of a phase. The run has it start new ones.

Only this module imports ray, and only once a run has ``cluster.address``.
"""

import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import current_thread, main_thread
from typing import Any

from kimi_core.cluster.worker import AGAIN_S, REFUSED, UNREACHABLE, Place, session
from kimi_core.weights.broadcast.gate import Gate
from kimi_core.weights.broadcast.transport import TransferError

END_S = 10.0
"""Seconds that a follower has to end by itself, once it is told to."""

TOKEN = "KIMI_CORE_RANKS_TOKEN"
"""Variable of a follower's environment: the token of rank 0's store, in hexadecimal digits."""

TOLD = 2000
"""Last characters of what a follower has printed that rank 0 gets to see."""

PATIENCE_S = 600.0
"""Seconds for which an actor tries again to reach the run."""


class RolloutActor:
    """What Ray starts."""

    def join(self, place: Place) -> None:
        """Be a worker. A session that took place ends this process.

        Raises:
            RuntimeError: the run refuses this worker, or does not answer.
        """
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            try:
                status = session(place)
            except (OSError, EOFError, TransferError):
                status = UNREACHABLE
            if status == REFUSED:
                raise RuntimeError(f"{place} refuses this worker: is it another kimi_core?")
            if status != UNREACHABLE:
                os._exit(status)
            time.sleep(AGAIN_S)
        raise RuntimeError(f"{place} cannot be reached from {os.uname().nodename}")


def how_ended(status: int) -> str:
    """The exit status of a process, negative for a signal, in words."""
    return f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"


class ProcessActor:
    """What Ray starts for a rank of the trainer: a process, of whose end it tells."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: Sequence[str], folder: str, token: str) -> str:
        """Run Python with these arguments, and return how it ended.

        Args:
            folder: where it runs, if this host has such a folder.
            token: for its environment, as ``TOKEN``.
        """
        self._process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder if os.path.isdir(folder) else None,
            # What it says is shown to users.
            env=os.environ | {TOKEN: token, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        said, _ = self._process.communicate()
        how = how_ended(self._process.returncode)
        return f"on {os.uname().nodename} ended {how}. {said[-TOLD:]}".strip()

    def kill(self) -> None:
        if self._process:
            self._process.kill()


class RayCluster:
    """A run's connection to a Ray cluster.

    Args:
        address: of the cluster; ``auto``: the one that this host belongs to.

    Raises:
        ValueError: ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError(
                f"cluster.address = {address!r} needs ray: pip install 'kimi-core[ray]'"
            ) from None
        self.ray: Any = ray
        self._is_ours = not ray.is_initialized()
        in_main_thread = current_thread() is main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"cluster.address = {address!r}: {error}\nStart a cluster with `ray start --head` "
                "on one host and `ray start --address=HEAD:6379` on the others"
            ) from error
        finally:
            if in_main_thread:  # ray takes it, and the run finishes its iteration at SIGTERM.
                signal.signal(signal.SIGTERM, handler)
        self.host: str = ray.util.get_node_ip_address()
        """Address of this host, at which the others reach it."""

    def close(self) -> None:
        """Leave the cluster, unless the process was in it before. Safe to call twice."""
        if self._is_ours:
            self.ray.shutdown()
        self._is_ours = False


class RayFollowers:
    """Implements ``Followers`` with processes on the hosts of a Ray cluster.

    Args:
        cluster: which ``close`` leaves, too.
        port: of rank 0's store on the loopback interface. The others come through a gate.
        ranks: which to start.
        words: the arguments of Python, given the address of the gate and the rank.
        cpus: that Ray keeps free for each; a follower uses as many threads.
        gpus: the same.

    Raises:
        ValueError: as ``RayCluster``.
    """

    def __init__(
        self,
        cluster: RayCluster,
        port: int,
        ranks: Sequence[int],
        words: Callable[[str, int], list[str]],
        *,
        cpus: int,
        gpus: int,
    ) -> None:
        self._cluster = cluster
        token = secrets.token_bytes(32)
        self._gate = Gate(cluster.host, port, token)
        address = f"{cluster.host}:{self._gate.port}"
        actor = cluster.ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_concurrency=2, scheduling_strategy="SPREAD"
        )(ProcessActor)
        self._actors = {rank: actor.remote() for rank in ranks}
        self._ends = {
            rank: one.run.remote(words(address, rank), os.getcwd(), token.hex())
            for rank, one in self._actors.items()
        }

    def ended(self) -> str:
        ray = self._cluster.ray
        for rank, end in self._ends.items():
            if not ray.wait([end], timeout=0)[0]:
                continue
            try:
                how = ray.get(end)
            except ray.exceptions.RayError as error:
                how = f"has no process any more: {error}"
            return f"Rank {rank} of the trainer {how}"
        return ""

    def close(self) -> None:
        if self._ends:
            self._cluster.ray.wait(
                list(self._ends.values()), num_returns=len(self._ends), timeout=END_S
            )
        self.kill()

    def kill(self) -> None:
        """End them at once, and leave the cluster."""
        ray = self._cluster.ray
        ray.wait([one.kill.remote() for one in self._actors.values()], timeout=END_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors, self._ends = {}, {}
        self._gate.close()
        self._cluster.close()


class RayWorkers:
    """The rollout workers of a run on a Ray cluster.

    Args:
        address: as for ``RayCluster``.
        cpus: that Ray keeps free for each worker, which uses as many threads.

    Raises:
        ValueError: as ``RayCluster``.
    """

    def __init__(self, address: str, *, cpus: int) -> None:
        self._cluster = RayCluster(address)
        self._cpus = cpus
        self._actors: list[Any] = []
        self._joined: list[Any] = []
        """What each actor's ``join`` will have given; it gives nothing unless it fails."""

    @property
    def host(self) -> str:
        """Address of this host, at which the others reach it."""
        return self._cluster.host

    def start(self, master: tuple[str, int], token: bytes, count: int) -> None:
        """Have Ray start workers that join the run at ``master``. Does not wait for them."""
        actor = self._cluster.ray.remote(
            num_cpus=self._cpus,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )(RolloutActor)
        for number in range(count):
            self._actors.append(actor.remote())
            place = Place(master, token, f"ray-{number}", self._cpus)
            self._joined.append(self._actors[-1].join.remote(place))

    def missing(self) -> str:
        """Why a worker will not come; empty: nothing is known against it."""
        ended, _ = self._cluster.ray.wait(self._joined, num_returns=len(self._joined), timeout=0)
        for one in ended:
            try:
                self._cluster.ray.get(one)
            except self._cluster.ray.exceptions.RayError as error:
                return str(getattr(error, "cause", None) or error)
        return ""

    def close(self) -> None:
        """End the workers, and leave the cluster. Safe to call twice."""
        for actor in self._actors:
            self._cluster.ray.kill(actor, no_restart=True)
        self._actors, self._joined = [], []
        self._cluster.close()
