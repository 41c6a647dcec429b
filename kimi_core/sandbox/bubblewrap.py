"""The command line of bubblewrap for one sandbox, and what the sandbox sees of the host."""

import functools
import importlib.util
import os
import shutil
import stat
import sys
from pathlib import Path

from kimi_core.sandbox.program import MB, SandboxUnavailable

FOLDER = "/box"
"""The work folder: a program finds its files here and may write."""
PACKAGES = "/opt/packages"
"""Where numpy is found, if the Python that runs the programs has this interpreter's version."""
TMPFS_BYTES = 64 * MB
"""Size of the work folder, of /tmp and of /dev/shm, each."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": FOLDER,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # Sets of strings have the same order each time.
    "OPENBLAS_NUM_THREADS": "1",  # numpy would make a thread for each core of the host.
}


@functools.cache
def find_bwrap() -> str:
    """The path of bubblewrap.

    Raises:
        SandboxUnavailable: it is not installed.
    """
    # Not the one of a wheel or of the user's PATH: Ubuntu's AppArmor profile names this one.
    found = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin")
    if found is None:
        raise SandboxUnavailable(
            "bubblewrap is not installed, and no program runs without it: apt-get install "
            "bubblewrap (Debian, Ubuntu) or dnf install bubblewrap (Fedora)"
        )
    return found


@functools.cache
def find_python() -> str:
    """The Python that runs programs.

    It is the base of this interpreter if the sandbox's user can reach it, otherwise the
    distribution's.

    Raises:
        SandboxUnavailable: the user can reach neither.
    """
    ours = os.path.realpath(sys.executable)
    for path in (ours, "/usr/bin/python3"):
        if os.access(path, os.X_OK) and (os.geteuid() != 0 or _open_to_all(Path(path))):
            return path
    raise SandboxUnavailable(
        f"{ours} lies below a folder that is closed to other users, and there is no "
        "/usr/bin/python3: apt-get install python3"
    )


def _open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)


def _binds(python: str) -> list[str]:
    args = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            args += ["--symlink", os.readlink(name).lstrip("/"), name]
        elif os.path.isdir(name):
            args += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        args += ["--ro-bind-try", name, name]
    if not python.startswith("/usr/"):
        prefix = str(Path(python).parent.parent)
        args += ["--ro-bind", prefix, prefix]
    for folder in numpy_folders(python):
        args += ["--ro-bind", str(folder), f"{PACKAGES}/{folder.name}"]
    return args


def numpy_folders(python: str) -> list[Path]:
    """The folders of numpy, which programs and checks may import, if ``python`` can load it."""
    found = importlib.util.find_spec("numpy")
    version = "python{}.{}".format(*sys.version_info)
    if os.path.basename(os.path.realpath(python)) != version or found is None or not found.origin:
        return []
    package = Path(found.origin).parent
    if os.geteuid() == 0 and not _open_to_all(package):
        return []
    return [one for one in (package, package.with_name("numpy.libs")) if one.is_dir()]


def command(*, own_network: bool, files: list[tuple[int, str]], fds: dict[str, int]) -> list[str]:
    """Arguments for bwrap up to the ``--`` after which the program follows.

    Args:
        own_network: make a network namespace; False if the caller is in an empty one.
        files: (descriptor, name) of each file that is copied into the work folder.
        fds: bwrap's ``seccomp``, ``block`` and ``json-status`` descriptors.
    """
    args = list(_isolation(own_network))
    for fd, name in files:
        args += ["--perms", "0755", "--file", str(fd), f"{FOLDER}/{name}"]
    args += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", FOLDER]
    for name, fd in fds.items():
        args += [f"--{name}" if name == "seccomp" else f"--{name}-fd", str(fd)]
    return [*args, "--"]


@functools.cache
def _isolation(own_network: bool) -> tuple[str, ...]:
    """The arguments that every sandbox has; its root is still writable."""
    args = ["bwrap", "--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc"]
    args += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "box"]
    args += ["--unshare-net"] if own_network else []
    args += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--uid", "1000"]
    args += ["--gid", "1000", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        args += ["--setenv", name, value]
    args += [*_binds(find_python()), "--proc", "/proc", "--dev", "/dev"]
    for mode, folder in (("0700", FOLDER), ("1777", "/tmp"), ("1777", "/dev/shm")):
        args += ["--perms", mode, "--size", str(TMPFS_BYTES), "--tmpfs", folder]
    return tuple(args)
