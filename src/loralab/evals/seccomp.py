"""The list of system calls that a confined program may make, as a seccomp filter of the Linux kernel.

What is not on the list does not exist for a program (`ENOSYS`): sockets, exec, ptrace, new namespaces, keys, bpf, io_uring,
memfd, shared memory of System V, message queues, performance counters, other processes' memory, and what a later kernel adds.

Taking a filter in costs the kernel milliseconds, so a nursery puts itself behind it, once, and its programs inherit it. It
therefore lets through what a nursery does for each program, with exactly its flags; that needs rights that programs have given up.

Sources: seccomp(2); linux/filter.h, linux/audit.h; numbers from asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import ctypes
import os
import platform
import struct
from errno import ENOSYS

CALLS = """
read:0:63 write:1:64 open:2:- openat:257:56 close:3:57 close_range:436:436 fstat:5:80 stat:4:- lstat:6:-
newfstatat:262:79 statx:332:291 lseek:8:62 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 access:21:-
faccessat:269:48 faccessat2:439:439 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 fcntl:72:25 flock:73:32
fsync:74:82 fdatasync:75:83 ftruncate:77:46 truncate:76:45 fallocate:285:47 getdents64:217:61 getcwd:79:17
chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 readlink:89:-
readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 umask:95:166 utimensat:280:88 statfs:137:43 fstatfs:138:44
sendfile:40:71 copy_file_range:326:285 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233
brk:12:214 futex:202:98 set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 set_tid_address:218:96
sched_yield:24:124 sched_getaffinity:204:123 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 fork:57:-
vfork:58:- clone:56:220 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getpgrp:111:- getpgid:121:155 setpgid:109:154 getsid:124:156 setsid:112:157 getgroups:115:158
getrusage:98:165 times:100:153 prlimit64:302:261 getrlimit:97:163 setrlimit:160:164 uname:63:160 sysinfo:99:179
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 sigaltstack:131:132 kill:62:129 tgkill:234:131 tkill:200:130 alarm:37:- setitimer:38:103
getitimer:36:102 pause:34:- restart_syscall:219:128 clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 nanosleep:35:101 gettimeofday:96:169 time:201:- select:23:- pselect6:270:72 poll:7:-
ppoll:271:73 epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd2:290:19
socketpair:53:199 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209
setsockopt:54:208 getsockname:51:204 getpeername:52:205 ioctl:16:29 getrandom:318:278
"""
"""Name, number on x86_64, number on aarch64; a dash where the machine has no such call."""

OF_NURSERIES = (
    "mount:165:40 umount2:166:39 setns:308:268 pidfd_open:434:434 capset:126:91 setresuid:117:147 setresgid:119:149"
)
"""What a nursery does beyond it; a program has not the rights."""

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""How the kernel names the machines that the list is written for."""
NEW_NAMESPACES = 0x7E020000
"""Flags of `clone` that would make a namespace."""
NEW_PIDS = 0x20000111
"""Flags of `clone` for process 1 of a PID namespace, in the memory of the nursery: CLONE_NEWPID, CLONE_VM, SIGCHLD."""
NEW_PID, SCRATCH_FLAGS, DETACH = 0x20000000, 0xE, 0x2
"""Flags of a nursery's `setns`, `mount` (no set-user-ID, no devices, nothing to run) and `umount2`."""
UNIX = 1
TERMINAL_AND_FLAGS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Requests of `ioctl`: is it a terminal, its size, bytes waiting, do not block, close or keep on exec."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, MACHINE, FIRST, SECOND, FOURTH = 0, 4, 16, 24, 40
"""Offsets in seccomp_data; of arguments the lower half."""
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | ENOSYS, 0x80000000
OTHER_TABLE = 0x40000000
"""First number of the calls in the x32 fashion of x86_64."""

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def machine() -> str | None:
    """Name this machine if the list is written for it, as a process of 64 bits with the low byte first."""
    name = platform.machine()
    return name if name in AUDIT and struct.calcsize("P") == 8 else None


def numbers(calls: str, of: str) -> dict[str, int]:
    """Give the numbers of listed calls on a machine."""
    column = list(AUDIT).index(of) + 1
    rows = [entry.split(":") for entry in calls.split()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def instructions(of: str) -> list[Instruction]:
    """Write the filter of a machine: by number, and for a few calls by an argument."""
    refuse, allow = (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)

    def only(argument: int, *values: int) -> list[Instruction]:
        return [(LOAD, 0, 0, argument), *(step for value in values for step in ((EQUAL, 0, 1, value), allow)), refuse]

    looked_into = {
        "clone": [(LOAD, 0, 0, FIRST), (EQUAL, 0, 1, NEW_PIDS), allow, (ANY_BIT, 0, 1, NEW_NAMESPACES), refuse, allow],
        "socketpair": only(FIRST, UNIX),
        "ioctl": only(SECOND, *TERMINAL_AND_FLAGS),
        "setns": only(SECOND, NEW_PID),
        "umount2": only(SECOND, DETACH),
        "mount": only(FOURTH, SCRATCH_FLAGS),
    }
    steps: list[Instruction] = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, AUDIT[of]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, OTHER_TABLE),
        refuse,
    ]
    for name, number in numbers(f"{CALLS} {OF_NURSERIES}", of).items():
        then = looked_into.get(name, [allow])
        steps += [(EQUAL, 0, len(then), number), *then]
    return [*steps, refuse]


def install(steps: list[Instruction]) -> None:
    """Put this process and all that it starts behind a filter, for good; `no_new_privs` must be set. Raises OSError."""
    program = _Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    set_seccomp, by_filter = 22, 2
    if libc.prctl(set_seccomp, by_filter, ctypes.byref(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
