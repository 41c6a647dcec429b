"""Rollout workers that Ray places on the hosts of its cluster, and starts again when they end.

1. The run connects to the cluster at ``cluster.address``, and listens as with ``cluster.listen``.
2. Ray starts an actor for each of ``rollout.workers``: a process in which ``worker.py`` has one
   session with the run. Tokens and weights go between worker and run, and never through Ray.
3. When a session ends, so does the actor's process, whatever the reason. Ray starts the actor
   again, on any host that has room, and the worker joins at the version of that time.
4. When the run ends, Ray ends its actors.

Only this module imports ray, and only once a run has ``cluster.address``.
"""

import logging
import os
import signal
import time
from threading import current_thread, main_thread
from typing import Any

from kimi_core.cluster.worker import AGAIN_S, REFUSED, UNREACHABLE, Place, session
from kimi_core.weights.broadcast.transport import TransferError

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


class RayWorkers:
    """The rollout workers of a run on a Ray cluster.

    Args:
        address: of the cluster; ``auto``: the one that this host belongs to.
        cpus: that Ray keeps free for each worker, which uses as many threads.

    Raises:
        ValueError: ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str, *, cpus: int) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError(
                f"cluster.address = {address!r} needs ray: pip install 'kimi-core[ray]'"
            ) from None
        self._ray: Any = ray
        self._cpus = cpus
        self._actors: list[Any] = []
        self._joined: list[Any] = []
        """What each actor's ``join`` will have given; it gives nothing unless it fails."""
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

    def start(self, master: tuple[str, int], token: bytes, count: int) -> None:
        """Have Ray start workers that join the run at ``master``. Does not wait for them."""
        actor = self._ray.remote(
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
        ended, _ = self._ray.wait(self._joined, num_returns=len(self._joined), timeout=0)
        for one in ended:
            try:
                self._ray.get(one)
            except self._ray.exceptions.RayError as error:
                return str(getattr(error, "cause", None) or error)
        return ""

    def close(self) -> None:
        """End the workers, and leave the cluster. Safe to call twice."""
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._actors, self._joined = [], []
        if self._is_ours:
            self._ray.shutdown()
        self._is_ours = False
