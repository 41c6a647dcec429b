"""Starts the other ranks of a trainer, on this host or by Ray, and sees how they end.

A follower needs three things: the address of rank 0's store, the generation, and its rank. What it
has to know of the run is in the store, but for the weights, which rank 0 sends. Whatever else
starts followers has to give them no more.
"""

import fcntl
import os
import pickle
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from kimi_core.cluster.placement import END_S, RayCluster, RayFollowers, how_ended
from kimi_core.config import Config
from kimi_core.models.placement import device_of
from kimi_core.trainer.blueprint import Blueprint
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks

FOLLOWER = "kimi_core.run.follower"

HOST = "127.0.0.1"
SIOCGIFADDR = 0x8915
"""Linux: the address of an interface."""


def words(address: str, generation: str, rank: int) -> list[str]:
    """What Python is called with to follow."""
    # -P: in the repository's root, -m would import the uncompiled folder there.
    return ["-P", "-m", FOLLOWER, address, generation, str(rank)]


class LocalFollowers:
    """Implements ``Followers`` with child processes of this one."""

    def __init__(self, address: str, generation: str, ranks: Sequence[int]) -> None:
        self._processes = {
            rank: subprocess.Popen(
                [sys.executable, *words(address, generation, rank)],
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
                how = how_ended(status)
                return f"Rank {rank} of the trainer (pid {process.pid}) ended {how}."
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


def use_interface_to(host: str) -> None:
    """Have the collectives use the interface by which this host reaches ``host``.

    Orders are pickled, so nobody who need not reach the ranks should: for ranks of one host the
    interface is the loopback one. What the environment says already stays.
    """
    name = "lo0" if sys.platform == "darwin" and host == HOST else _interface_to(host)
    for library in ("GLOO", "NCCL") if name else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)


def _interface_to(host: str) -> str:
    """Its name; empty: unknown, and the libraries choose."""
    if sys.platform != "linux":
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((host, 9))  # Sends nothing.
        own = socket.inet_aton(route.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(route, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # It has no address.
                continue
            if found[20:24] == own:
                return name
    return ""


def start_ranks(config: Config, policy: Policy) -> Ranks:
    """The ranks of a run's trainer, of which this process is rank 0. Waits until all have come.

    With ``cluster.address`` the others are on the hosts of a Ray cluster, else on this one.

    Args:
        policy: this process's; the others make it without weights.

    Raises:
        RankFailed: a rank ended, or did not come in ``trainer.ranks_timeout_s``.
        ValueError: there is no such cluster.
    """
    settings = config.trainer
    if settings.ranks == 1:
        return Ranks()
    cluster = RayCluster(config.cluster.address) if config.cluster.address else None
    use_interface_to(cluster.host if cluster else HOST)
    server = local_store(settings.ranks_timeout_s)
    generation = secrets.token_hex(4)
    store = dist.PrefixStore(generation, server)
    store.set("config", config.model_dump_json())
    store.set("policy", pickle.dumps(Blueprint.of(policy)).hex())
    others = range(1, settings.ranks)
    followers = (
        RayFollowers(
            cluster,
            server.port,
            others,
            lambda address, rank: words(address, generation, rank),
            cpus=config.cluster.worker_cpus,
            gpus=int(device_of(config.model.device).type == "cuda"),
        )
        if cluster
        else LocalFollowers(f"{HOST}:{server.port}", generation, others)
    )
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
