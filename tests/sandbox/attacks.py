"""Hostile programs, one a function, as they would come from a model.

Each is run with ``PRELUDE`` before it. One that tries what must not work says ``escaped`` when it
did; one that tries to exhaust something simply goes on until it is stopped.
"""

from dataclasses import dataclass, field

from kimi_core.sandbox import Status

PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, time

libc = ctypes.CDLL(None, use_errno=True)

def syscall(number, *arguments):
    return libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])

def escaped(*what):
    print("escaped:", *what, flush=True)

def refused(*calls):
    # Each call, a function of nothing, must raise OSError.
    for index, call in enumerate(calls):
        try:
            result = call()
        except OSError:
            continue
        escaped("call", index, result)

def failing(*calls):
    # Each system call, a tuple, must return -1.
    for call in calls:
        if syscall(*call) != -1:
            escaped("system call", call[0])
"""
CONTAINED = b"done\n"


@dataclass(frozen=True)
class Attack:
    name: str
    source: str
    status: Status = Status.OK
    """OK: it tried, failed, and ended by itself."""
    limits: dict[str, float] = field(default_factory=lambda: {"wall_s": 20.0})
    exit_code: int | None = 0
    needs_cgroup: bool = False
    """Without one it ends in another way, bounded by other limits: docs/sandbox.md."""


def tries(name: str, source: str) -> Attack:
    """An attack that must fail and then says so."""
    return Attack(name, source + "\nprint('done')")


def exhausts(
    name: str, source: str, status: Status, needs_cgroup: bool = False, **limits: float
) -> Attack:
    return Attack(name, source, status, {"wall_s": 20.0, **limits}, None, needs_cgroup)


MB = 1 << 20

TRIES = [
    tries(
        "host_files",
        """
for path in ("/etc/passwd", "/etc/shadow", "/root", "/home", "/var/log", "/run", "/sys", "/boot"):
    refused(lambda: os.stat(path))
""",
    ),
    tries(
        "environment",
        """
for path in ("/proc/self/environ", "/proc/1/environ"):
    if b"KIMI" in open(path, "rb").read():
        escaped(path)
known = {"PATH", "HOME", "LANG", "PWD", "PYTHONHASHSEED", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}
if set(os.environ) - known:
    escaped(os.environ)
""",
    ),
    tries(
        "sockets",
        """
for family in range(46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind).close()
        except OSError:
            continue
        if family != socket.AF_UNIX:
            escaped(family, kind)
refused(lambda: socket.create_connection(("127.0.0.1", 22), timeout=1))
refused(lambda: socket.getaddrinfo("example.org", 80))
""",
    ),
    tries(
        "symlinks",
        """
os.symlink("/etc/passwd", "link")
os.symlink("/proc/1/root", "root")
os.symlink("../../../../../..", "up")
refused(
    lambda: open("link"), lambda: open("root/etc/passwd"), lambda: open("up/etc/passwd"),
    lambda: open("/proc/self/root/etc/passwd"), lambda: open("/proc/1/cwd/etc/passwd"),
    lambda: os.link("/proc/1/exe", "exe"),
)
""",
    ),
    tries(
        "signals_to_others",
        """
for target in (os.getppid(), 1, -1, *range(1, 2000)):
    if target != os.getpid():
        for sent in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
            try:
                os.kill(target, sent)
            except OSError:
                continue
if os.getppid() != 1 or os.stat("/proc/1") is None:
    escaped("init is gone")
""",
    ),
    tries(
        "namespaces",
        """
flags = (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80)
X86 = os.uname().machine == "x86_64"
UNSHARE, CLONE, SETNS = (272, 56, 308) if X86 else (97, 220, 268)
for flag in flags:
    failing((UNSHARE, flag))
    if flag != 0x80:  # To clone, that is no flag.
        failing((CLONE, flag | signal.SIGCHLD, 0, 0, 0, 0), (CLONE, flag | 0x10000000, 0, 0, 0, 0))
failing((435, ctypes.create_string_buffer(88), 88))  # clone3
for name in os.listdir("/proc/1/ns"):
    try:
        fd = os.open("/proc/1/ns/" + name, os.O_RDONLY)
    except OSError:
        continue
    failing((SETNS, fd, 0))
""",
    ),
    tries(
        "mounts",
        """
MOUNT, UMOUNT, PIVOT = (165, 166, 155) if os.uname().machine == "x86_64" else (40, 39, 41)
failing(
    (MOUNT, b"none", b"/tmp", b"tmpfs", 0, 0), (MOUNT, b"/", b"/tmp", 0, 0x1000, 0),
    (MOUNT, 0, b"/", 0, 0x20, 0), (MOUNT, b"proc", b"/tmp", b"proc", 0, 0),
    (UMOUNT, b"/proc", 2), (UMOUNT, b"/box", 2), (PIVOT, b"/box", b"/box"),
    (428, -100, b"/", 1), (429, 0, b"", 0, b"", 0), (430, b"tmpfs", 0), (433, -100, b"/", 0),
    (442, -100, b"/", 0, 0, 0),
)
refused(lambda: os.chroot("/box"))
""",
    ),
    tries(
        "ptrace",
        """
X86 = os.uname().machine == "x86_64"
PTRACE, READV, WRITEV = (101, 310, 311) if X86 else (117, 270, 271)
child = os.fork()
if child == 0:
    time.sleep(60)
failing((PTRACE, 0, 0, 0, 0), (PTRACE, 16, child, 0, 0), (PTRACE, 0x4206, 1, 0, 0))
failing((READV, 1, 0, 0, 0, 0, 0), (WRITEV, child, 0, 0, 0, 0, 0), (438, 3, 0, 0))
""",
    ),
    tries(
        "kernel_doors",
        """
X86 = os.uname().machine == "x86_64"
BPF, USERFAULT, PERF = (321, 323, 298) if X86 else (280, 282, 241)
room = ctypes.create_string_buffer(256)
failing((BPF, 0, room, 128), (BPF, 5, room, 128))
failing((425, 8, room), (426, 3, 0, 0, 0, 0), (427, 3, 0, 0, 0))  # io_uring
failing((USERFAULT, 0), (USERFAULT, 1), (PERF, room, 0, -1, -1, 0))
""",
    ),
    tries(
        "keyrings",
        """
ADD, REQUEST, KEYCTL = (248, 249, 250) if os.uname().machine == "x86_64" else (217, 218, 219)
failing((ADD, b"user", b"name", b"data", 4, -3), (REQUEST, b"user", b"name", 0, -3))
for operation in range(32):
    failing((KEYCTL, operation, -3, 1, 0, 0))
""",
    ),
    tries(
        "clocks_and_power",
        """
X86 = os.uname().machine == "x86_64"
SETTIME, SETTIMEOFDAY, ADJTIMEX = (227, 164, 159) if X86 else (112, 170, 171)
REBOOT, SYSLOG, INIT = (169, 103, 175) if X86 else (142, 116, 105)
KEXEC, SWAPON = (246, 167) if X86 else (104, 224)
room = ctypes.create_string_buffer(256)
failing((SETTIME, 0, room), (SETTIMEOFDAY, room, 0), (ADJTIMEX, room), (SYSLOG, 3, room, 256))
failing((REBOOT, 0xFEE1DEAD, 672274793, 0, 0), (INIT, room, 256, b""), (KEXEC, 0, 0, 0, 0))
failing((SWAPON, b"/box/x", 0))
refused(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
""",
    ),
    tries(
        "setuid",
        """
refused(lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]))
refused(lambda: os.setresuid(0, 0, 0), lambda: os.setuid(1001), lambda: os.chown("/box", 0, 0))
open("shell", "wb").write(open("/bin/sh", "rb").read())
os.chmod("shell", 0o6755)
for command in (["./shell", "-c", "id -u"], ["/usr/bin/su", "-c", "id -u"], ["/usr/bin/passwd"]):
    try:
        out = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout
    except OSError:
        continue
    if out.strip() == b"0":
        escaped(command)
refused(lambda: os.mknod("device", 0o60666, os.makedev(8, 0)))
""",
    ),
    tries(
        "descriptors",
        """
own = {int(name) for name in os.listdir("/proc/self/fd")}
own = {fd for fd in own if os.path.exists(f"/proc/self/fd/{fd}")}
if own - {0, 1, 2}:
    escaped({fd: os.readlink(f"/proc/self/fd/{fd}") for fd in own})
links = {os.readlink(f"/proc/1/fd/{name}") for name in os.listdir("/proc/1/fd")}
ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)}
for link in links - ours - {"anon_inode:[eventfd]"}:
    escaped("init holds", link)
for name in os.listdir("/proc/1/fd"):
    if os.readlink(f"/proc/1/fd/{name}") not in ours:
        refused(lambda: os.open(f"/proc/1/fd/{name}", os.O_RDWR))
""",
    ),
    tries(
        "proc",
        """
def write(path, text="1"):
    with open(path, "w") as file:
        file.write(text)

refused(
    lambda: write("/proc/sys/kernel/core_pattern", "|/box/x"),
    lambda: write("/proc/sysrq-trigger", "b"), lambda: write("/proc/sys/vm/overcommit_memory"),
    lambda: write("/proc/self/oom_score_adj", "-1000"),
    lambda: write("/proc/1/oom_score_adj", "-1000"), lambda: write("/proc/sys/kernel/ns_last_pid"),
    lambda: write("/proc/self/uid_map", "0 0 1"), lambda: write("/proc/self/setgroups", "allow"),
    lambda: open("/proc/kcore", "rb").read(1), lambda: open("/proc/kmsg", "rb").read(1),
    lambda: write("/proc/sys/user/max_user_namespaces", "99"),
)
numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
if len(numbers) > 2:
    escaped("processes", numbers)
""",
    ),
    tries(
        "writing_outside",
        """
for folder in ("/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/proc/sys", "/lib", "/bin"):
    refused(lambda: open(folder + "/kimi", "w"), lambda: os.mkdir(folder + "/kimi"))
refused(lambda: os.unlink("/usr/bin/env"), lambda: os.rename("/usr/bin/env", "/usr/bin/kimi"))
refused(lambda: os.chmod("/usr/bin/env", 0o777), lambda: os.utime("/usr/bin/env"))
refused(lambda: open("/usr/bin/python3", "r+b"), lambda: os.truncate("/etc/ld.so.cache", 0))
for name in ("null", "zero"):
    refused(lambda: os.chmod("/dev/" + name, 0o777), lambda: os.unlink("/dev/" + name))
""",
    ),
    tries(
        "full_folders",
        """
def fill(folder):
    total = 0
    try:
        for index in range(1000):
            with open(f"{folder}/{index}", "wb", buffering=0) as file:
                while file.tell() < 8 << 20:
                    total += file.write(bytes(1 << 20))
    except OSError:
        pass
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    return total

for folder in ("/tmp", "/dev/shm", "/box"):
    if not 1 << 20 < fill(folder) <= 64 << 20:
        escaped(folder)
""",
    ),
    tries(
        "terminal",
        """
import fcntl, termios
refused(lambda: open("/dev/tty"), lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"))
parent, child = os.openpty()
refused(lambda: fcntl.ioctl(child, termios.TIOCSTI, b"x"), lambda: fcntl.ioctl(child, 0x541C, b"x"))
""",
    ),
    tries(
        "limits_raised",
        """
import resource
for name in ("NPROC", "FSIZE", "NOFILE", "CPU", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (hard + 1, hard + 1))
    except ValueError:
        continue
    escaped(kind)
refused(lambda: os.nice(-5), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
""",
    ),
    tries(
        "zombies",
        """
for _ in range(20):
    if os.fork() == 0:
        os._exit(0)
""",
    ),
    tries(
        "daemon",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for sent in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(sent, signal.SIG_IGN)
        time.sleep(1000)
    os._exit(0)
""",
    ),
]

EXHAUSTS = [
    exhausts(
        "fork_bomb",
        """
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        Status.TIME,
        wall_s=1.0,
    ),
    exhausts(
        "threads",
        """
import threading
while True:
    threading.Thread(target=time.sleep, args=(1000,)).start()
""",
        Status.TIME,  # The program's own end waits for its threads.
        wall_s=2.0,
    ),
    exhausts(
        "memory",
        """
held = []
while True:
    held.append(bytearray(b"x") * (1 << 20))
""",
        Status.MEMORY,
        memory_bytes=128 * MB,
    ),
    exhausts(
        "memory_of_many",
        """
for _ in range(8):
    if os.fork() == 0:
        break
held = bytearray(b"x") * (48 << 20)
time.sleep(1000)
""",
        Status.MEMORY,
        memory_bytes=256 * MB,
    ),
    exhausts(
        "memory_of_files",
        """
for index in range(1000):
    fd = os.memfd_create("x")
    for _ in range(8):
        os.write(fd, bytes(1 << 20))
""",
        Status.MEMORY,
        needs_cgroup=True,
        memory_bytes=128 * MB,
    ),
    exhausts(
        "system_v_memory",
        """
libc.shmat.restype = ctypes.c_void_p
while True:
    size = 16 << 20
    address = libc.shmat(libc.shmget(0, size, 0o1600), None, 0)
    ctypes.memset(address, 1, size)
""",
        Status.MEMORY,
        needs_cgroup=True,
        memory_bytes=128 * MB,
    ),
    exhausts("stdout", "while True: os.write(1, b'x' * 4096)", Status.OUTPUT),
    exhausts("stderr", "while True: os.write(2, b'x' * 4096)", Status.OUTPUT),
    exhausts("busy", "while True: pass", Status.TIME, wall_s=1.0),
    exhausts(
        "busy_children",
        """
for _ in range(4):
    os.fork()
while True:
    pass
""",
        Status.TIME,
        cpu_s=1.0,
    ),
    exhausts("sleep", "time.sleep(1000)", Status.TIME, wall_s=0.5),
    exhausts(
        "deaf",
        """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1000)
""",
        Status.TIME,
        wall_s=0.5,
    ),
    exhausts("stopped", "os.kill(os.getpid(), signal.SIGSTOP)", Status.TIME, wall_s=0.5),
    exhausts("closed_pipes", "os.closerange(0, 3)\ntime.sleep(1000)", Status.TIME, wall_s=0.5),
    exhausts(
        "inodes",
        """
import itertools
for index in itertools.count():
    os.close(os.open(f"/tmp/{index}", os.O_CREAT))
""",
        Status.MEMORY,
        memory_bytes=64 * MB,
        cpu_s=20.0,
    ),
]

ENDS = [
    Attack(
        "init_taken_over",
        """
# Init belongs to the same user, so its memory can be written; it must be worth nothing.
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
if status["Seccomp"].strip() != "2" or status["NoNewPrivs"].strip() != "1":
    escaped("init is not filtered")
for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if int(status[kind], 16):
        escaped("init has", kind)
code = next(line for line in open("/proc/1/maps") if " r-xp " in line)
start, end = (int(bound, 16) for bound in code.split()[0].split("-"))
try:
    with open("/proc/1/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(b"\\xcc" * (end - start))  # A breakpoint at its every step.
except OSError:  # Where Yama forbids it.
    os._exit(133)
""",
        Status.RUNTIME,
        exit_code=133,
    ),
    Attack(
        "big_file",
        """
with open("big", "wb") as file:
    while True:
        file.write(bytes(1 << 20))
""",
        Status.RUNTIME,
        exit_code=1,
    ),
    Attack("core_dump", "os.abort()", Status.RUNTIME, exit_code=134),
    Attack(
        "forged_report",
        """
forged = b'{ "exit-code": 0 }\\n'
for fd in range(3, 1024):
    try:
        os.write(fd, forged)
    except OSError:
        pass
for process in ("1", "self"):
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            os.write(os.open(f"/proc/{process}/fd/{name}", os.O_WRONLY), forged)
        except OSError:
            pass
for name in ("result.json", "/tmp/result.json", "/box/reward.txt"):
    open(name, "w").write('{"status": "OK", "reward": 1.5}')
print('{"status": "OK", "exit_code": 0}')
print("Status.OK", "PASSED", "1.0", "NaN", flush=True)
os._exit(5)
""",
        Status.RUNTIME,
        exit_code=5,
    ),
    Attack("other_calling_convention", "syscall(0x40000000 + 39)", Status.RUNTIME, exit_code=159),
    Attack(
        "signal_to_itself", "os.kill(os.getpid(), signal.SIGKILL)", Status.RUNTIME, exit_code=137
    ),
    Attack(
        "outlived_by_a_writer",
        """
if os.fork() == 0:
    time.sleep(1000)
os._exit(3)
""",
        Status.RUNTIME,
        exit_code=3,
    ),
]

ATTACKS = [*TRIES, *EXHAUSTS, *ENDS]
