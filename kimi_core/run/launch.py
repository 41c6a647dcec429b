"""Starts the other ranks of a trainer on this host, and sees how they end.

A follower needs three things: the address of rank 0's store, the generation, and its rank. What it
has to know of the run is in the store, but for the weights, which rank 0 sends. Whatever else
starts followers has to give them no more.
"""

import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from kimi_core.config import Config
from kimi_core.trainer.blueprint import Blueprint
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks

FOLLOWER = "kimi_core.run.follower"

HOST = "127.0.0.1"

END_S = 10.0
"""Seconds that a follower has to end by itself, once it is told to."""


class LocalFollowers:
    """Implements ``Followers`` with child processes of this one."""

    def __init__(self, address: str, generation: str, ranks: Sequence[int]) -> None:
        self._processes = {
            rank: subprocess.Popen(
                # -P: in the repository's root, -m would import the uncompiled folder there.
                [sys.executable, "-P", "-m", FOLLOWER, address, generation, str(rank)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # Ctrl-C is meant for rank 0.
            )
            for rank in ranks
        }

    def ended(self) -> str:
        for rank, process in self._processes.items():
            status = process.poll()
            if status is not None:
                how = (
                    f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
                )
                return (
                    f"Rank {rank} of the trainer (pid {process.pid}) ended {how}. The last saved "
                    "state is intact: continue with --resume"
                )
        return ""

    def close(self) -> None:
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes.values():
            process.kill()
            process.wait()


def local_store(timeout_s: float) -> dist.TCPStore:
    """A store that only processes of this host can reach; by itself torch listens everywhere."""
    listener = socket.create_server((HOST, 0))
    return dist.TCPStore(
        HOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def start_ranks(config: Config, policy: Policy) -> Ranks:
    """The ranks of a run's trainer, of which this process is rank 0. Waits until all have come.

    Args:
        policy: this process's; the others make it without weights.

    Raises:
        RankFailed: a rank ended, or did not come in ``trainer.ranks_timeout_s``.
    """
    settings = config.trainer
    if settings.ranks == 1:
        return Ranks()
    # Orders are pickled, so nobody outside of this host may reach the ranks.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    server = local_store(settings.ranks_timeout_s)
    generation = secrets.token_hex(4)
    store = dist.PrefixStore(generation, server)
    store.set("config", config.model_dump_json())
    store.set("policy", pickle.dumps(Blueprint.of(policy)).hex())
    followers = LocalFollowers(f"{HOST}:{server.port}", generation, range(1, settings.ranks))
    try:
        return Ranks.meet(
            store,
            0,
            settings.ranks,
            timeout_s=settings.ranks_timeout_s,
            copies=settings.context_parallel * settings.tensor_parallel,
            followers=followers,
        )
    except BaseException:
        followers.kill()
        raise
