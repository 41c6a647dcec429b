"""A slot: a small process that runs one sandbox at a time and belongs to one Pool.

    python -c 'from kimi_core.sandbox.slot import main; main()' FD WARM

The slot starts the sandboxes, and not the trainer, for three reasons. Some process must inherit
their orphans (``PR_SET_CHILD_SUBREAPER``) and wait for all of them. The sandboxes take over the
network namespace and the real user ids of the slot. And a sandbox ends with the thread that started
it. Programs come over FD, one at a time, and results go back. The slot ends with its pool or with
the pool's process. Every sandbox ends with the slot, however the slot dies: the kernel ensures it.
"""

import contextlib
import os
import pwd
import select
import socket
import sys

from kimi_core.sandbox import cgroups, wire
from kimi_core.sandbox.cgroups import Cgroup
from kimi_core.sandbox.program import Program, Result, SandboxUnavailable, Status
from kimi_core.sandbox.sandbox import Identity, Sandbox, StartError, await_ready, start_python
from kimi_core.sandbox.supervise import Abandoned, supervise
from kimi_core.sandbox.syscalls import become_subreaper, enter_empty_network

SEND_S = 60.0
NUMBERS = range(58_000, 59_000)
"""Numbers of the slots on a host. As root they are also the user ids."""


class Slot:
    """One sandbox after another, as one identity."""

    def __init__(self, identity: Identity, owners: tuple[int, ...], warm: bool) -> None:
        self._identity, self._owners, self._warm = identity, owners, warm
        self._waiting: Sandbox | None = None
        self._last_was_python = True

    def prepare(self) -> None:
        """Start the Python that waits for the next program, if the slot keeps one.

        Not after a command, because a compiled program is usually followed by others.
        """
        if self._warm and self._last_was_python and self._waiting is None:
            with contextlib.suppress(StartError):  # The next program will report it.
                self._waiting = start_python(self._identity)

    def run(self, program: Program) -> Result:
        """Run one program. A sandbox that fails gives INFRA."""
        try:
            sandbox, stdin = self._sandbox(program)
        except StartError as error:
            return Result(Status.INFRA, None, b"", b"", 0.0, 0.0, 0, str(error))
        cgroup = self._identity.cgroup
        try:
            sandbox.limit(program.limits)
            if cgroup:
                cgroup.begin(program.limits)
            if not program.is_python:
                sandbox.go()
            return supervise(sandbox, stdin, program.limits, cgroup, self._owners)
        finally:
            sandbox.kill()
            sandbox.reap()
            sandbox.close()

    def _sandbox(self, program: Program) -> tuple[Sandbox, bytes]:
        """A sandbox that is about to begin, and what it will read."""
        self._last_was_python = program.is_python
        if not isinstance(program.program, str):
            self.discard()  # A slot has one cgroup and one user: one sandbox at a time.
            return Sandbox(self._identity, list(program.program), program.files), program.stdin
        if self._waiting is not None and self._waiting.dead:
            self.discard()
        sandbox, self._waiting = self._waiting or start_python(self._identity), None
        await_ready(sandbox)
        # Text from JSON may hold half a surrogate pair; Python then says what is wrong with it.
        source = program.program.encode(errors="surrogatepass")
        files = {**program.files, "main.py": source}
        head = "".join(f"{len(data)} {name}\n" for name, data in files.items())
        return sandbox, b"".join([head.encode(), b"\n", *files.values(), program.stdin])

    def discard(self) -> None:
        """End the waiting sandbox."""
        if self._waiting is not None:
            self._waiting.kill()
            self._waiting.reap()
            self._waiting.close()
            self._waiting = None


def claim_number() -> tuple[int, socket.socket]:
    """A number that no other slot on the host has, and the socket that holds the number.

    It is an abstract socket: exclusive, and freed by the kernel when its process dies.

    Raises:
        SandboxUnavailable: all numbers are taken.
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
    """Take the identity of slot ``number``; also return what could not be had, in words."""
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
    """Run programs until the pool closes its end (EOFError) or its process has ended."""
    while True:
        slot.prepare()
        ready, _, _ = select.select([connection.fileno(), owner], [], [])
        if owner in ready:
            raise Abandoned
        wire.send(connection, slot.run(wire.receive(connection, SEND_S)), SEND_S)
