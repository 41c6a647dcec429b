"""The system calls that a sandboxed program may not make, as BPF for ``bwrap --seccomp``.

It is a deny list, because nobody can list what arbitrary programs need, and the namespaces isolate.
The filter denies calls that reach into the kernel instead of the sandbox: new namespaces and
mounts, other socket families, bpf, io_uring, keyrings, perf, ptrace, clocks, modules. They fail
with EPERM, as without privilege. ``clone3`` fails with ENOSYS, because a filter cannot see its
flags; libc then falls back to ``clone``.

The filter compares numbers, and these belong to one architecture. Calls of another one (32-bit code
on x86-64, or x32) end the process.

Format: ``struct sock_filter {u16 code; u8 jt, jf; u32 k}`` of linux/filter.h, over ``struct
seccomp_data {u32 nr, arch; u64 instruction_pointer, args[6]}`` of linux/seccomp.h.
"""

import errno
import functools
import platform
import socket
import struct

from kimi_core.sandbox.program import SandboxUnavailable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
X32 = 0x40000000

# name: (x86-64, aarch64); None: the architecture has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # Other processes' memory and descriptors.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    # Wide doors into the kernel, where most of its holes have been.
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "vmsplice": (278, 75),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "uselib": (134, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "nfsservctl": (180, 42),
    # Keyrings do not belong to any namespace.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # The machine: clock, log, modules, power.
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "reboot": (169, 142),
    "vhangup": (153, 58),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
CLONE, CLONE3 = (56, 220), (435, 435)
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
IOCTL = (16, 29)
# CLONE_NEW* of linux/sched.h: NS, CGROUP, UTS, IPC, USER, PID, NET.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x60000000
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX write into the host's terminal.

# The instructions used: load a word, jump if equal, if at least, or if any bit is set; return.
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # low halves: both architectures are little-endian


def _errno(number: int) -> int:
    return 0x00050000 | number


def _op(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    """One instruction; ``true`` and ``false`` are numbers of instructions to skip."""
    return struct.pack("=HBBI", code, true, false, k)


def _when(nr: int, *body: bytes) -> list[bytes]:
    """``body`` for the call ``nr`` only; the accumulator holds ``nr`` before and after."""
    return [_op(_EQUAL, nr, 0, len(body) + 1), *body, _op(_LOAD, _NR)]


@functools.cache
def program(machine: str = platform.machine()) -> bytes:
    """The filter for ``machine``, as in ``platform.machine()``.

    Raises:
        SandboxUnavailable: the table has no numbers of this architecture.
    """
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise SandboxUnavailable(f"No seccomp filter for {machine}; there is one for {known}")
    column = list(ARCHITECTURES).index(machine)
    deny = _op(_RETURN, _errno(errno.EPERM))
    code = [
        _op(_LOAD, _ARCH),
        _op(_EQUAL, ARCHITECTURES[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NR),
    ]
    if machine == "x86_64":
        code += [_op(_AT_LEAST, X32, 0, 1), _op(_RETURN, _KILL)]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            code += [_op(_EQUAL, number, 0, 1), deny]
    code += [_op(_EQUAL, CLONE3[column], 0, 1), _op(_RETURN, _errno(errno.ENOSYS))]
    code += _when(CLONE[column], _op(_LOAD, _ARG0), _op(_BITS, NEW_NAMESPACES, 0, 1), deny)
    for call in (SOCKET, SOCKETPAIR):
        unix = _op(_EQUAL, socket.AF_UNIX, 1, 0)
        code += _when(call[column], _op(_LOAD, _ARG0), unix, deny)
    first, second = TERMINAL_INPUT
    code += _when(
        IOCTL[column],
        _op(_LOAD, _ARG1),
        _op(_EQUAL, first, 1, 0),
        _op(_EQUAL, second, 0, 1),
        deny,
    )
    return b"".join([*code, _op(_RETURN, _ALLOW)])
