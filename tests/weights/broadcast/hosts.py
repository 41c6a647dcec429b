"""A host of ``test_broadcast.py`` in a process of its own, which may die or freeze on the way.

    python hosts.py receive '{"address": [...], "arena": PATH, "name": "a", ...}'
    python hosts.py send '{"arena": PATH, ...}'

It says what happens to it in lines of JSON. With ``fault`` and ``version`` it sends itself that
signal in the middle of that version's bytes.
"""

import json
import os
import signal
import sys

import torch
from weights.broadcast.broadcast_fixtures import QUICK, weights

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.broadcast import receiver
from kimi_core.weights.broadcast import sender as broadcast
from kimi_core.weights.broadcast.rounds import BroadcastSettings, Fenced
from kimi_core.weights.broadcast.transport import move

FAULT_AT = 4 * QUICK.bucket_bytes


def say(**event) -> None:
    print(json.dumps(event), flush=True)


def move_or_fail(hook: str, fault: str):
    """``move`` that sends this process a signal when bytes ``FAULT_AT`` on are there."""

    def moving(group, payload, deadline, **given):
        hooked = given[hook]

        def fail(start: int, end: int) -> None:
            hooked(start, end)
            if start == FAULT_AT:
                os.kill(os.getpid(), getattr(signal, fault))

        return move(group, payload, deadline, **{**given, hook: fail})

    return moving


def receive(given: dict) -> None:
    arena = WeightArena.open(given["arena"], readonly=False)
    tp_rank = given.get("tp_rank", 0)
    with receiver.WeightReceiver(
        tuple(given["address"]), arena, name=given["name"], tp_rank=tp_rank
    ) as host:
        say(joined=host.join())
        while True:
            armed = arena.active_version == given.get("version", 0) - 1 and "fault" in given
            receiver.move = move_or_fail("landed", given.pop("fault")) if armed else move
            try:
                taken = host.take(timeout_s=120)
                say(taken=taken.version, called_off=taken.called_off)
            except Fenced as error:
                say(fenced=str(error))
                receiver.move = move
                say(joined=host.join())


def send(given: dict) -> None:
    """Publish version 1 to so many members, then the fatal one."""
    arena = WeightArena.open(given["arena"], readonly=False)
    settings = BroadcastSettings(**given["settings"])
    with broadcast.WeightSender([arena], host="127.0.0.1", settings=settings) as sender:
        say(address=sender.address)
        while len(sender.members) < given["members"]:
            sys.stdin.readline()  # The test says when to look again.
        sender.publish(weights(1), version=1)
        broadcast.move = move_or_fail("ready", given["fault"])
        sender.publish(weights(2), version=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"receive": receive, "send": send}[sys.argv[1]](json.loads(sys.argv[2]))
