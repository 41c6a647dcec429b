"""A slot: a small process that runs one sandbox at a time and belongs to one Pool.

    python -c 'from kimi_core.sandbox.slot import main; main()' FD WARM

Sandboxes are started from here rather than from the trainer, because their orphans must be
inherited by somebody (``PR_SET_CHILD_SUBREAPER``) who waits for all of them, because the network
namespace and the real user ids of this process are theirs, and because a sandbox is bound to the
life of the thread that starts it. Over FD come requests, one at a time, and go back results. The
slot ends with its pool or the process of its pool, and every sandbox ends with the slot: the kernel
sees to it, whatever way the slot dies.
"""

import contextlib
import os
import pwd
import select
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_core.sandbox import cgroups, wire
from kimi_core.sandbox.cgroups import Cgroup
from kimi_core.sandbox.program import Limits, Result, SandboxUnavailable, Status
from kimi_core.sandbox.sandbox import Identity, Sandbox, StartError, await_ready, start_python
from kimi_core.sandbox.supervise import Abandoned, watch
from kimi_core.sandbox.syscalls import become_subreaper, enter_empty_network

SEND_S = 60.0
NUMBERS = range(58_000, 59_000)
"""Of slots on a host; as root, also their user ids."""


@dataclass(frozen=True)
class Request:
    program: bytes | list[str]
    """Python source, or a command."""
    stdin: bytes
    files: Mapping[str, bytes]
    limits: Limits


class Slot:
    """One sandbox after another, as one identity."""

    def __init__(self, identity: Identity, owners: tuple[int, ...], warm: bool) -> None:
        self._identity, self._owners, self._warm = identity, owners, warm
        self._waiting: Sandbox | None = None
        self._last_was_python = True

    def prepare(self) -> None:
        """Start the Python that waits for the next program, if the slot keeps one.

        Not after a command: where one is run, such as a compiled program, more will follow.
        """
        if self._warm and self._last_was_python and self._waiting is None:
            with contextlib.suppress(StartError):  # The next request will say it.
                self._waiting = start_python(self._identity)

    def run(self, request: Request) -> Result:
        """Run one program; a sandbox that fails gives INFRA."""
        try:
            sandbox, stdin = self._sandbox(request)
        except StartError as error:
            return Result(Status.INFRA, None, b"", b"", 0.0, 0.0, 0, str(error))
        cgroup = self._identity.cgroup
        try:
            sandbox.limit(request.limits)
            if cgroup:
                cgroup.begin(request.limits)
            if not isinstance(request.program, bytes):
                sandbox.go()
            return watch(sandbox, stdin, request.limits, cgroup, self._owners)
        finally:
            sandbox.kill()
            sandbox.reap()
            sandbox.close()

    def _sandbox(self, request: Request) -> tuple[Sandbox, bytes]:
        """One that is about to begin, and what it will read."""
        self._last_was_python = isinstance(request.program, bytes)
        if not isinstance(request.program, bytes):
            self.discard()  # A slot has one cgroup and one user: one sandbox at a time.
            return Sandbox(self._identity, request.program, request.files), request.stdin
        if self._waiting is not None and self._waiting.dead:
            self.discard()
        sandbox, self._waiting = self._waiting or start_python(self._identity), None
        await_ready(sandbox)
        files = {**request.files, "main.py": request.program}
        head = "".join(f"{len(data)} {name}\n" for name, data in files.items())
        return sandbox, b"".join([head.encode(), b"\n", *files.values(), request.stdin])

    def discard(self) -> None:
        """End the sandbox that waits."""
        if self._waiting is not None:
            self._waiting.kill()
            self._waiting.reap()
            self._waiting.close()
            self._waiting = None


def claim_number() -> tuple[int, socket.socket]:
    """A number that no other slot on the host has, and what holds it while it is open.

    An abstract socket: it is exclusive, and the kernel frees it when its process dies.

    Raises:
        SandboxUnavailable: all are taken.
    """
    for number in NUMBERS:
        with contextlib.suppress(KeyError):
            pwd.getpwuid(number)
            continue
        if lock := _lock(str(number)):
            return number, lock
    raise SandboxUnavailable(f"All of {len(NUMBERS)} slots of this host are taken")


def _lock(name: str) -> socket.socket | None:
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{cgroups.PREFIX}{name}")
    except OSError:
        lock.close()
        return None
    return lock


def identify(number: int) -> tuple[Identity, list[str]]:
    """Become what slot ``number`` is to be; also what could not be had, in words."""
    missing = []
    root = os.geteuid() == 0
    cgroup = None
    try:
        for name in cgroups.leftovers():
            if name != str(number) and (lock := _lock(name)):
                Cgroup(name).close()
                lock.close()
        cgroup = Cgroup(str(number))
    except OSError as error:
        missing.append(str(error))
    own_network = True
    if root:
        with contextlib.suppress(OSError):
            enter_empty_network()
            own_network = False
    return Identity(number if root else None, cgroup, own_network), missing


def main() -> None:
    fd, warm = int(sys.argv[1]), bool(int(sys.argv[2]))
    os.set_inheritable(fd, False)
    owner = os.pidfd_open(os.getppid())
    connection = socket.socket(fileno=fd)
    become_subreaper()
    try:
        number, lock = claim_number()
    except SandboxUnavailable as error:
        wire.send(connection, str(error), SEND_S)
        return
    identity, missing = identify(number)
    slot = Slot(identity, (owner, fd), warm)
    with contextlib.closing(lock):
        try:
            wire.send(connection, missing, SEND_S)
            serve(slot, connection, owner)
        except (Abandoned, EOFError, BrokenPipeError, ConnectionResetError):
            return
        finally:
            slot.discard()
            if identity.cgroup:
                identity.cgroup.close()


def serve(slot: Slot, connection: socket.socket, owner: int) -> None:
    """Answer requests until the pool closes its end (EOFError) or its process is gone."""
    while True:
        slot.prepare()
        ready, _, _ = select.select([connection.fileno(), owner], [], [])
        if owner in ready:
            raise Abandoned
        wire.send(connection, slot.run(wire.receive(connection, SEND_S)), SEND_S)
