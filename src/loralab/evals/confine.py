"""Confinement on Linux: namespaces, a root of its own, limits, no rights. Standard library only: it runs without site packages.

`enter` is called once by a nursery (`nursery.py`) and leaves it in new user, mount, PID, network, IPC and UTS namespaces, in a
root that holds nothing but Python's own library, read-only. A process that is to run a program then sets its limits and gives up
its rights.

Sources: user_namespaces(7), pid_namespaces(7), mount_setattr(2), pivot_root(2), capabilities(7), prctl(2).
"""

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EPERM
from pathlib import Path
from typing import Any

from loralab.evals import seccomp

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
SAME_MEMORY = 0x100
NO_SUID, NO_DEVICES, NO_EXEC, BIND, RECURSIVE, PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
DETACH = 2
MOUNT_SETATTR, PIVOT_ROOT, CAPSET = 442, {"x86_64": 155, "aarch64": 41}, {"x86_64": 126, "aarch64": 91}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
READ_ONLY, WITHOUT_SUID = 0x1, 0x2
DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38

SCRATCH = "/tmp"
"""Where a program may write; the only such place."""
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534
"""Who a program is to the machine where root runs it; inside, user 1."""
OPEN_FILES = 256
FILES = 10_000
"""Most files and folders in a scratch folder."""


libc = ctypes.CDLL(None, use_errno=True)
_STACK = ctypes.create_string_buffer(1 << 16)


class Refused(Exception):
    """A protection cannot be had here; the message names it and what the system said."""


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Turn what the system refuses into `Refused`."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{what}: {error.strerror or error}") from error


def _call(name: str, *values: Any) -> int:
    """Call a function of the C library by name, or a system call by number after `syscall`. Raises OSError."""
    typed = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    result = getattr(libc, name)(*typed)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode() if kind else None, flags, options.encode())


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; nothing where there is no such call."""
    if sys.platform == "linux":
        _call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def enter() -> int:
    """Go on as process 1 of new namespaces; the process that called waits for it and ends with its exit code.

    Returns:
        The user that programs are to be, inside: 1, where root started this and a second user could be named, else 0.

    Raises:
        Refused: the kernel, the container or the machine does not offer something of it.
    """
    if sys.platform != "linux":
        raise Refused(f"namespaces: {sys.platform} has none")
    if seccomp.machine() is None:
        raise Refused(f"seccomp: there is no list of system calls for {platform.machine()}")
    with needing("user namespaces"):
        user = _separate()
    with needing("a host name of its own"):
        _call("sethostname", b"sandbox", 7)
    with needing("a root of its own"):
        _new_root()
    with needing("a first process"):
        first = os.fork()
    if first:
        os.closerange(0, OPEN_FILES)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    die_with_parent()
    with needing("a list of permitted system calls"):
        _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if user:
            os.setgroups([])
        seccomp.install(seccomp.instructions(platform.machine()))
    return user


def _separate() -> int:
    """Unshare all namespaces; a helper outside writes who is who, as only it has the right to name a second user.

    The kernel does not count the processes of its own root, so where that is who started this, programs must be another.
    """
    user = int(os.getuid() == 0 and _is_mapped(NOBODY))
    reader, writer = os.pipe()
    me, helper = os.getpid(), os.fork()
    if helper == 0:
        with suppress(OSError):
            os.close(writer)
            if os.read(reader, 1):
                _name_users(me, user)
                os._exit(0)
        os._exit(1)
    try:
        _call("unshare", NEW_USER | NEW_MOUNTS | NEW_PID | NEW_NETWORK | NEW_IPC | NEW_UTS)
        os.write(writer, b".")
    finally:
        os.close(reader)
        os.close(writer)
        _, status = os.waitpid(helper, 0)
    if status:
        raise PermissionError(EPERM, "users cannot be named")
    return user


def _is_mapped(user: int) -> bool:
    rows = (map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines())
    return any(first <= user < first + count for first, _, count in rows)


def _name_users(process: int, user: int) -> None:
    """Name the one who called root inside, and with `user` also nobody user 1."""
    if not user:
        Path(f"/proc/{process}/setgroups").write_text("deny")
    second = f"\n1 {NOBODY} 1" if user else ""
    Path(f"/proc/{process}/gid_map").write_text(f"0 {os.getgid()} 1{second}")
    Path(f"/proc/{process}/uid_map").write_text(f"0 {os.getuid()} 1{second}")


def _new_root() -> None:
    """Make a root with Python's library, the system's shared libraries, four devices, and nothing else; all read-only."""
    _mount("none", "/", None, RECURSIVE | PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in _visible()}  # first, as the new root may lie on top of some
    _mount("root", SCRATCH, "tmpfs", NO_SUID | NO_DEVICES, "mode=755,size=1m")
    for path, handle in sources.items():
        target = SCRATCH + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            os.makedirs(target, exist_ok=True)
        else:
            Path(target).touch()
        _mount(f"/proc/self/fd/{handle}", target, None, BIND | RECURSIVE)
        os.close(handle)
    for link in LIBRARIES:
        if os.path.islink(link) and not os.path.lexists(SCRATCH + link):
            os.symlink(os.readlink(link), SCRATCH + link)
    os.mkdir(SCRATCH + SCRATCH)
    os.symlink(SCRATCH, f"{SCRATCH}/dev/shm")  # shared memory and locks of `multiprocessing` count as scratch
    attributes = struct.pack("4Q", READ_ONLY | WITHOUT_SUID, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, SCRATCH.encode(), AT_RECURSIVE, attributes, len(attributes))
    os.chdir(SCRATCH)
    _call("syscall", PIVOT_ROOT[platform.machine()], b".", b".")
    _call("umount2", b".", DETACH)
    os.chdir("/")


def _visible() -> list[str]:
    """List what a program may read, no path below another."""
    wanted = [*LIBRARIES, f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", *sys.path, *DEVICES]
    paths = sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


def mount_scratch(size: int, user: int) -> None:
    """Lay an empty folder over `SCRATCH` that holds at most `size` bytes in `FILES` files, and that nothing can be run from."""
    options = f"mode=700,size={size},nr_inodes={FILES},uid={user},gid={user}"
    _mount("scratch", SCRATCH, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, options)


def unmount_scratch() -> None:
    """Take the folder away, with all that is in it."""
    _call("umount2", SCRATCH.encode(), DETACH)


def new_pids() -> int:
    """Start process 1 of a new PID namespace: when it is killed, the kernel kills all others there, however they were started.

    It sleeps for ever with all signals blocked and needs no memory of its own, so the C library's `pause` on a small stack will do.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        top = ctypes.c_void_p(ctypes.addressof(_STACK) + len(_STACK))
        return _call("clone", libc.pause, top, SAME_MEMORY | NEW_PID | signal.SIGCHLD, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fork_among(first: int) -> int:
    """Fork a process into the PID namespace of its process 1."""
    there, back = os.pidfd_open(first), os.pidfd_open(os.getpid())
    try:
        _call("setns", there, NEW_PID)
        process = os.fork()
        if process:
            _call("setns", back, NEW_PID)
        return process
    finally:
        os.close(there)
        os.close(back)


def limit(cpu_s: float, memory_bytes: int, processes: int, file_bytes: int, *, strict: bool = True) -> None:
    """Set the kernel's limits for this process and those it starts, or keep those there are where they are lower.

    Where one is missing, go on, or with `strict` raise OSError.
    """
    cpu = math.ceil(cpu_s)
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1),  # the first sends a signal that a program may catch, the second kills
        "RLIMIT_AS": (memory_bytes, memory_bytes),
        "RLIMIT_NPROC": (processes, processes),
        "RLIMIT_FSIZE": (file_bytes, file_bytes),
        "RLIMIT_NOFILE": (OPEN_FILES, OPEN_FILES),
        "RLIMIT_CORE": (1, 1),  # of 0 a machine's handler of crashes would be called
        "RLIMIT_MEMLOCK": (0, 0),
    }
    for name, values in limits.items():
        number = getattr(resource, name)
        highest = resource.getrlimit(number)[1]
        if highest != resource.RLIM_INFINITY:
            values = min(values[0], highest), min(values[1], highest)
        try:
            resource.setrlimit(number, values)
        except (OSError, ValueError) as error:  # macOS has no limit of the address space
            if strict:
                raise OSError(f"{name}: {error}") from error


def give_up_rights(user: int) -> None:
    """Become a user without capabilities, for good: with no exec and no new user namespace there is no way back."""
    if user:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("syscall", CAPSET[platform.machine()], header, nothing)
