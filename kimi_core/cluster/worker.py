"""A rollout worker on another host than the run: ``kimi worker --connect HOST:PORT``.

1. This process imports everything once, and then forks a child for each session with the master.
2. The child connects, proves that it knows the token, and gets a ``RemoteStart``. It makes an arena
   in this host's shared memory, and a thread of it keeps the arena at the version of the master
   (``weights/broadcast/receiver.py``).
3. Once the arena has a version, the child is a worker like those of the run's host.
4. The child ends when the connection does. This process then starts a session again, which joins at
   the version of that time, until the run is over or nobody has answered for ``patience_s``.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from kimi_core.cluster.handshake import GREET_S, Refused, greet, limit, waits
from kimi_core.cluster.listener import RemoteStart
from kimi_core.models import token_text
from kimi_core.models.load import auto_class
from kimi_core.rollout import orders
from kimi_core.rollout.torch.worker import BEAT_S, Served, Start
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.broadcast.receiver import JoinRefused, WeightReceiver, follow
from kimi_core.weights.broadcast.transport import TransferError
from kimi_core.weights.layout import Layout
from kimi_core.weights.publish import SLOTS, folder_with_room

OVER, REFUSED, LOST, UNREACHABLE = 0, 1, 3, 4
"""How a session ended, as the exit status of its process."""

AGAIN_S = 1.0
"""Seconds between two sessions."""

IDLE_S = 7 * 24 * 3600.0
"""Longest wait for a version; that the master is there is seen at the connection."""

FIRST_S = 24 * 3600.0
"""Longest wait for the first version: SFT may come before it."""


@dataclass(frozen=True)
class Place:
    """Where and as whom a worker joins."""

    address: tuple[str, int]
    token: bytes
    name: str
    threads: int

    def __str__(self) -> str:
        return f"The master at {self.address[0]}:{self.address[1]}"


def serve(place: Place, *, patience_s: float, say: Callable[[str], None]) -> int:
    """Be a worker until the run is over.

    Args:
        patience_s: seconds for which a master that does not answer is tried again.

    Returns:
        0 if the master said that the run is over, 1 if it refused this worker or was not there.
    """
    reached, missed = time.monotonic(), False
    while True:
        status = _in_a_child(place)
        if status in (OVER, REFUSED):
            say("The run is over" if status == OVER else "This worker cannot take part; see above")
            return status
        if status != UNREACHABLE:
            say(f"{place} has ended the connection; joining again")
            reached = time.monotonic()
        elif not missed:
            say(f"{place} cannot be reached; trying again for {patience_s:g} s")
        missed = status == UNREACHABLE
        if time.monotonic() - reached > patience_s:
            say(f"{place} did not answer for {patience_s:g} s")
            return 1
        time.sleep(AGAIN_S)


def _in_a_child(place: Place) -> int:
    """Have one session in a process of its own, and return its exit status."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status = LOST
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ends with its parent.
        status = session(place)
    except (OSError, EOFError, TransferError) as error:
        _complain(f"{place}: {error}")
    except BaseException:  # noqa: BLE001 - the child must not go on as its parent does.
        traceback.print_exc()
    finally:
        os._exit(status)


def session(place: Place) -> int:
    """Join, and work until the connection ends, which ends the process. Return why it could not."""
    try:
        raw = socket.create_connection(place.address, timeout=GREET_S)
    except OSError:
        return UNREACHABLE
    waits(raw, GREET_S)
    connection = Connection(raw.dup().detach())
    try:
        greet(connection, place.token, is_master=False)
        connection.send_bytes(place.name.encode())
        start = RemoteStart(**json.loads(connection.recv_bytes()))
        config = AutoConfig.for_model(**start.model)
        layout = Layout.from_config(config, dtype=start.dtype)
        if layout.hash.hex() != start.layout:
            raise Refused("it lays out the weights in another way: install one version everywhere")
        model = _model(config, start)
        text = token_text.from_json(start.text) if start.text else None
    except (Refused, ValueError, TypeError) as error:
        _complain(f"{place} and this worker do not fit: {error}")
        return REFUSED
    limit(raw, start.silent_s)
    waits(raw, start.silent_s)
    threading.Thread(target=_watch, args=(raw, os.getppid()), daemon=True).start()
    decode = partial(orders.unpacked, text=text)
    return _work(place, connection, start, model, layout, decode)


def _work(
    place: Place,
    connection: Connection,
    start: RemoteStart,
    model: PreTrainedModel,
    layout: Layout,
    decode: Callable[[bytes], tuple[Any, ...]],
) -> int:
    with tempfile.TemporaryDirectory(
        dir=folder_with_room(SLOTS * layout.payload_bytes), prefix="kimi_core-"
    ) as folder:
        path = Path(folder) / "weights"
        arena = WeightArena.create(path, layout, slots=SLOTS)
        kept = f"/proc/self/fd/{os.open(path, os.O_RDWR)}"
    there = threading.Event()
    threading.Thread(
        target=_follow, args=(tuple(start.weights), arena, place, there), daemon=True
    ).start()
    if not there.wait(FIRST_S):
        _complain(f"{place} published no weights in {FIRST_S:g} s")
        return LOST
    own = Start(
        model=model,
        arena=kept,
        batch_rows=start.batch_rows,
        longest=start.longest,
        threads=place.threads,
        linger_s=start.linger_s,
    )
    Served(connection, own, decode, lost=LOST).run()
    return LOST


def _follow(
    address: tuple[str, int], arena: WeightArena, place: Place, there: threading.Event
) -> None:
    """Keep the arena at the master's version. Without that there is no worker."""
    status = LOST
    try:
        receiver = WeightReceiver(address, arena, name=place.name, token=place.token)
        follow(receiver, switch=lambda version: there.set(), idle_s=IDLE_S)
    except JoinRefused as error:
        _complain(str(error))
        status = REFUSED
    except (OSError, TransferError, ValueError) as error:
        _complain(f"No weights: {error}")
    os._exit(status)


def _watch(connection: socket.socket, parent: int) -> None:
    """End this process if its parent has ended, or the master before there is an engine."""
    while os.getppid() == parent:
        time.sleep(BEAT_S)
        try:
            if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                break
        except BlockingIOError:
            pass
        except OSError:
            break
    os._exit(LOST)


def _model(config: PretrainedConfig, start: RemoteStart) -> PreTrainedModel:
    """The model with random weights, which the arena's replace."""
    made: Any = auto_class(config).from_config(config, dtype=getattr(torch, start.dtype))
    if type(made).__name__ != start.architecture:
        raise ValueError(f"the run has a {start.architecture}, and this is {type(made).__name__}")
    model: PreTrainedModel = made.eval()
    return model


def _complain(text: str) -> None:
    print(f"worker: {text}", file=sys.stderr, flush=True)
