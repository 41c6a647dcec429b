"""Weights between hosts beside the wire and beside memcpy, all over loopback in one run.

    pytest benches/bench_broadcast.py      # about a minute

538 MB, SmolLM2-135M in float32. Sender and receiver are processes; each way of sending is timed
from the sender's first byte to the receiver's word that the last one has come (and, in ours, is
served), rounds of all of them in turn, and the best round of each counts. The wire is a bare TCP
socket with the same bytes, as iperf would send them. Both processes share the machine's cores with
whatever else runs there, so ratios swing more than those of one process. It takes 4 GB of memory.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.broadcast.receiver import WeightReceiver
from kimi_core.weights.broadcast.rounds import BroadcastSettings
from kimi_core.weights.broadcast.sender import WeightSender
from kimi_core.weights.layout import Layout

ROUNDS = 4
WAIT_S = 120
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
ONE_PIECE = 1 << 40
"""Bucket bytes with which nothing overlaps: all is cast, then sent, then verified."""
WAYS = ("tcp", "buckets", "one piece")


class Peak(threading.Thread):
    """The most memory that this process holds, shared memory apart, above what it held at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self.now()
        self.done = threading.Event()
        self.start()

    def now(self) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.now())

    def extra_mb(self) -> float:
        self.done.set()
        self.join()
        return self.most - self.first


class Receiver:
    """The other process: receives each way when it is told to, and says what it has."""

    def __init__(self, **given) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def receive(given: dict) -> None:
    """What the other process does: a thread for each sender, and one socket."""
    torch.set_num_threads(1)

    arena = WeightArena.open(given["arena"], readonly=False)

    def follow(name: str) -> None:
        receiver = WeightReceiver(tuple(given[name]), arena, name=name)
        receiver.join()
        while True:
            receiver.take(timeout_s=WAIT_S)

    for name in WAYS[1:]:
        threading.Thread(target=follow, args=(name,), daemon=True).start()
    room = np.ones(given["bytes"], np.uint8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        peak = Peak()
        print(json.dumps({"port": server.getsockname()[1]}), flush=True)
        connection, _ = server.accept()
        with connection:
            while True:
                view = memoryview(room)
                while len(view) and (got := connection.recv_into(view)):
                    view = view[got:]
                if len(view):
                    break
                connection.sendall(b"!")
    print(json.dumps({"extra_mb": peak.extra_mb()}), flush=True)


@pytest.fixture(scope="module")
def setting():
    """Senders with one member each, the socket, and the weights."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folder = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
    layout = Layout.from_config(SMOLLM2, dtype="float32")
    senders = {}
    paths = [folder / f"bench-broadcast-{os.getpid()}-{side}" for side in ("sender", "receiver")]
    given = {"bytes": layout.payload_bytes, "arena": str(paths[1])}
    try:
        arena = WeightArena.create(paths[0], layout, slots=2)
        WeightArena.create(paths[1], layout, slots=2).close()
        for name, bucket_bytes in (("buckets", 64 << 20), ("one piece", ONE_PIECE)):
            settings = BroadcastSettings(
                bucket_bytes=bucket_bytes, answer_s=WAIT_S, transfer_s=WAIT_S
            )
            senders[name] = WeightSender([arena], host="127.0.0.1", settings=settings)
            given[name] = senders[name].address
        receiver = Receiver(**given)
        connection = socket.create_connection(("127.0.0.1", receiver.says()["port"]))
        until = time.monotonic() + WAIT_S
        while not all(sender.members for sender in senders.values()):
            assert time.monotonic() < until
            time.sleep(0.01)
        draw = torch.Generator().manual_seed(0)
        tensors = {
            part.name: torch.randn(part.whole, generator=draw)
            for _, part in layout.by_hf_name.values()
        }
        yield senders, connection, tensors, receiver
        receiver.end()
    finally:
        for sender in senders.values():
            sender.close()
        for path in paths:
            path.unlink(missing_ok=True)


def seconds(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def test_broadcast_beside_tcp_and_memcpy(setting, ratios):
    senders, connection, tensors, receiver = setting
    size = senders["buckets"]._arenas[0].layout.payload_bytes
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times: dict[str, list[float]] = {name: [] for name in (*WAYS, "memcpy")}
    peak, version = Peak(), 0

    def over_tcp() -> None:
        connection.sendall(source)
        assert connection.recv(1) == b"!"

    for _ in range(ROUNDS):
        times["tcp"].append(seconds(over_tcp))
        for name, sender in senders.items():
            version += 1
            publish = partial(sender.publish, tensors, version=version)
            times[name].append(seconds(publish))
            assert sender.members == [name]
        times["memcpy"].append(seconds(lambda: np.copyto(target, source)))
    extra = peak.extra_mb()
    connection.close()
    extra_there = receiver.says()["extra_mb"]
    best = {name: min(values) for name, values in times.items()}
    detail = f"{best['buckets']:.3f} s for {size / 1e6:.0f} MB: cast, sent, verified, voted, served"
    for peer, label in (("tcp", "raw loopback TCP"), ("memcpy", "memcpy")):
        ratio = best[peer] / best["buckets"]
        ratios.record("broadcast", label, ratio, detail=f"{detail}; {label} {best[peer]:.3f} s")
    ratios.record(
        "broadcast in buckets",
        "in one piece",
        best["one piece"] / best["buckets"],
        detail=f"{best['one piece']:.3f} s without overlap",
    )
    ratios.record(
        "broadcast memory",
        "a bucket of 64 MiB",
        64 * 1.048576 / max(extra, extra_there, 0.1),
        minimum=1.0,
        detail=f"{extra:.1f} MB above the arenas on the sender, {extra_there:.1f} on the receiver",
    )


if __name__ == "__main__":
    receive(json.loads(sys.argv[1]))
