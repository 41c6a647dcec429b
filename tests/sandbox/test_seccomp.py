"""The filter, run by an interpreter of BPF: its verdict on each call of each architecture."""

import errno
import struct

import pytest

from kimi_core.sandbox import SandboxUnavailable, seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
MACHINES = list(seccomp.ARCHITECTURES)


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel would do: the classic BPF machine, as far as the filter uses it."""
    arch = seccomp.ARCHITECTURES[machine] if arch is None else arch
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    code = [struct.unpack("=HBBI", op) for op in batched(seccomp.program(machine), 8)]
    accumulator, at = 0, 0
    while True:
        kind, true, false, k = code[at]
        at += 1
        if kind == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif kind == 0x06:
            return k
        else:
            met = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
            at += true if met[kind] else false


def batched(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_of_the_list_is_denied_and_no_other(machine: str) -> None:
    column = MACHINES.index(machine)
    denied = {numbers[column] for numbers in seccomp.DENIED.values()} - {None}
    special = {seccomp.CLONE3[column], seccomp.SOCKET[column], seccomp.SOCKETPAIR[column]}
    for number in range(600):
        expected = EPERM if number in denied else ALLOW
        if number not in special:
            assert verdict(machine, number) == expected, number
    assert verdict(machine, seccomp.CLONE3[column]) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide_over_clone_sockets_and_terminals(machine: str) -> None:
    column = MACHINES.index(machine)
    clone, socket, ioctl = seccomp.CLONE[column], seccomp.SOCKET[column], seccomp.IOCTL[column]
    thread = 0x00010000 | 0x00000100 | 0x00000F00 | 17
    assert verdict(machine, clone, thread) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, clone, flag | thread) == EPERM
    families = {family: verdict(machine, socket, family) for family in range(50)}
    assert [family for family, what in families.items() if what == ALLOW] == [1]
    assert verdict(machine, seccomp.SOCKETPAIR[column], 2) == EPERM
    assert verdict(machine, seccomp.SOCKETPAIR[column], 1) == ALLOW
    assert verdict(machine, socket, 1 << 32 | 2) == EPERM  # The kernel reads an int.
    assert verdict(machine, ioctl, 0, 0x5412) == EPERM
    assert verdict(machine, ioctl, 0, 0x541C) == EPERM
    assert verdict(machine, ioctl, 0, 0x5401) == ALLOW


def test_other_architectures_and_calling_conventions_end_the_process() -> None:
    i386, arm = 0x40000003, 0x40000028
    assert verdict("x86_64", 39, arch=i386) == KILL
    assert verdict("aarch64", 172, arch=arm) == KILL
    assert verdict("x86_64", 0x40000000 | 39) == KILL


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(SandboxUnavailable, match="No seccomp filter for s390x"):
        seccomp.program("s390x")
