"""Runs inside the sandbox for the self-test. Prints protection → fault as JSON; "" means it holds.

Nothing of this project can be imported here.
"""

import ctypes
import errno
import json
import os
import socket


def status() -> dict[str, str]:
    with open("/proc/self/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def denied(number: int, *args: int) -> bool:
    """Whether a system call fails with EPERM."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(number, *args) == -1 and ctypes.get_errno() == errno.EPERM


def unprivileged_user() -> str:
    own = status()
    if os.getuid() == 0 or os.geteuid() == 0:
        return "the program is root"
    if any(int(own[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb")):
        return "the program has capabilities"
    return "" if own["NoNewPrivs"] == "1" else "no_new_privs is not set"


def system_calls() -> str:
    if status()["Seccomp"] != "2":
        return "there is no seccomp filter"
    # unshare(CLONE_NEWUSER), bpf, io_uring_setup, keyctl and ptrace(PTRACE_TRACEME).
    numbers = {
        "x86_64": ((272, 0x10000000), (321,), (425,), (250,), (101, 0)),
        "aarch64": ((97, 0x10000000), (280,), (425,), (219,), (117, 0)),
    }[os.uname().machine]
    open_calls = [call[0] for call in numbers if not denied(*call, 0, 0, 0)]
    return f"system calls {open_calls} are allowed" if open_calls else ""


def network() -> str:
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
        try:
            socket.socket(family, socket.SOCK_RAW if family > 10 else socket.SOCK_STREAM).close()
        except OSError:
            continue
        return f"a socket of family {family} can be made"
    with open("/proc/net/dev") as file:
        devices = [line.split(":")[0].strip() for line in file if ":" in line]
    return "" if set(devices) <= {"lo"} else f"devices {devices} are visible"


def host_files() -> str:
    for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/run"):
        if os.path.lexists(path):
            return f"{path} is visible"
    return ""


def read_only_root() -> str:
    for folder in ("/", "/usr", "/usr/lib", "/etc", "/dev", "/proc/sys/kernel"):
        if os.access(folder, os.W_OK):
            return f"{folder} is writable"
    return ""


def empty_environment() -> str:
    known = {"PATH", "HOME", "LANG", "PWD", "PYTHONHASHSEED", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}
    extra = sorted(set(os.environ) - known)
    return f"{', '.join(extra)} are passed on" if extra else ""


def other_processes() -> str:
    seen = [name for name in os.listdir("/proc") if name.isdigit()]
    return "" if len(seen) <= 3 else f"{len(seen)} processes are visible"


def open_files() -> str:
    leaked = {}
    for fd in range(3, 4096):
        try:
            leaked[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return f"descriptors {leaked} are passed on" if leaked else ""


def sized_folders() -> str:
    for folder, limit in (("/box", 64 << 20), ("/tmp", 64 << 20), ("/dev/shm", 64 << 20)):
        if not os.path.isdir(folder):
            return f"{folder} is not there"
        state = os.statvfs(folder)
        if state.f_blocks * state.f_frsize > limit:
            return f"{folder} holds more than {limit} bytes"
    return ""


print(
    json.dumps(
        {
            "unprivileged user": unprivileged_user(),
            "system-call filter": system_calls(),
            "no network": network(),
            "host files hidden": host_files(),
            "read-only root": read_only_root(),
            "folders of limited size": sized_folders(),
            "empty environment": empty_environment(),
            "own process namespace": other_processes(),
            "no inherited descriptors": open_files(),
        }
    )
)
