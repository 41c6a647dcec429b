"""The gate in front of a store: who gets through, and how often."""

import secrets
import socket
from contextlib import closing

import pytest
import torch.distributed as dist

from kimi_core.cluster.handshake import Refused
from kimi_core.run.launch import local_store
from kimi_core.weights.broadcast.gate import LOOPBACK, Gate, tunnel

TOKEN = secrets.token_bytes(32)


@pytest.fixture
def gate():
    store = local_store(5)
    with closing(Gate(LOOPBACK, store.port, TOKEN)) as made:
        yield store, made


def test_a_store_that_connects_again_gets_through(gate):
    store, made = gate
    port = tunnel((LOOPBACK, made.port), TOKEN, seconds=5, again=True)
    for number in range(3):
        dist.TCPStore(LOOPBACK, port).set(f"key {number}", "value")
        assert store.get(f"key {number}") == b"value"


def test_once_is_once(gate):
    port = tunnel((LOOPBACK, gate[1].port), TOKEN, seconds=5)
    first = dist.TCPStore(LOOPBACK, port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, port), timeout=5)
    first.set("key", "value")
    assert gate[0].get("key") == b"value"


def test_another_token_is_refused(gate):
    with pytest.raises(Refused):
        tunnel((LOOPBACK, gate[1].port), secrets.token_bytes(32), seconds=5)


def test_a_closed_gate_lets_nobody_in_and_keeps_who_is(gate):
    store, made = gate
    port = tunnel((LOOPBACK, made.port), TOKEN, seconds=5, again=True)
    inside = dist.TCPStore(LOOPBACK, port)
    made.close()
    inside.set("key", "value")
    assert store.get("key") == b"value"
    with socket.create_connection((LOOPBACK, port), timeout=5) as late:
        assert late.recv(1) == b""  # The gate is gone: the tunnel hangs up.
