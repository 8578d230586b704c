"""Isolation of processes that run what a model wrote, in two kinds: bubblewrap or Landlock, with a
filter of system calls.

`bubblewrap`: namespaces of its own (files, processes, network, users), read-only Python and system
libraries and nothing else, a sized `/tmp` if asked for. `landlock`, where user namespaces are off:
the host's files, of which only the same can be read and none written; reduced, since names and
sizes of other files can be seen. Both: every capability dropped, an allow-list of system calls (no
process, no socket, no signal, no io_uring), hard limits, an empty environment, death with the
parent.

Which one holds on a machine is tested by attacking it (`self_test`), not by looking for a binary;
where none holds, nothing is run.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...agents.execution import Limits, SandboxError

Kind = Literal["bubblewrap", "landlock"]
Role = Literal["python", "candidate", "checker", "exec", "scorer"]

INIT = Path(__file__).with_name("init.py")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
}
LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/local/lib/libpython3.so")
DEVICES = ("/dev/null", "/dev/urandom")

# System calls that Python needs, and none that reaches another process, another machine or rarely
# used parts of the kernel.
CALLS = """
read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 pipe
pipe2 poll ppoll select pselect6
epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 socketpair
open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs
fstatfs readlink readlinkat getdents64
getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync
fdatasync flock fadvise64 fallocate
sendfile copy_file_range
mmap munmap mremap mprotect madvise brk mincore msync membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending sigaltstack alarm setitimer
getitimer pause
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
futex set_robust_list get_robust_list set_tid_address rseq sched_yield sched_getaffinity gettid
getpid getppid getuid geteuid getgid getegid
getresuid getresgid getgroups getpgrp getpgid getsid getrlimit getrandom uname sysinfo arch_prctl
restart_syscall
exit exit_group
"""
# duplicate, flags, locks, size of a pipe; F_SETOWN would send signals
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
# is it a terminal, bytes to read, blocking, inheritance
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
PR_SET_SECCOMP = 22
# a thread's name, names of memory; the signal at the parent's death stays
PRCTL = (15, 16, 0x53564D41)
CLONE_THREAD = 0x00010000
CLONE_SHARED = 0x7E032F00 | CLONE_THREAD  # all that a fork may share, and namespaces
PACKAGES = ("site-packages", "dist-packages")


def _seccomp() -> Any:
    try:
        return importlib.import_module("pyseccomp")
    except (ImportError, RuntimeError) as error:
        raise SandboxError(
            f"no filter of system calls ({error}); install pyseccomp and libseccomp2"
        ) from error


@functools.cache
def call_filter(executes: bool = False, forks: bool = False) -> str:
    """The allow-list of system calls as a BPF program, in hex. `executes`: exec and threads are
    allowed too. `forks`: fork, wait, and loading a second, narrower filter in the child.

    Other calls fail with EPERM; calls of another architecture end the process.
    """
    seccomp = _seccomp()
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))

    def allow(name: str, *arguments: Any, action: int = seccomp.ALLOW) -> None:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
        if number >= 0:  # some architectures lack some
            rules.add_rule(action, number, *arguments)

    for name in [
        *CALLS.split(),
        *(["execve"] if executes else []),
        *(["wait4"] if executes or forks else []),
    ]:
        allow(name)
    for name, argument, values in (("fcntl", 1, FCNTL), ("ioctl", 1, IOCTL), ("prctl", 0, PRCTL)):
        for value in values:
            allow(name, seccomp.Arg(argument, seccomp.EQ, value))
    for name in ("prlimit64", "sched_getscheduler"):
        # its own process only; raising a hard limit takes a capability
        allow(name, seccomp.Arg(0, seccomp.EQ, 0))
    # the C library then uses clone, whose flags a filter can check
    allow("clone3", action=seccomp.ERRNO(errno.ENOSYS))
    if executes:
        allow("clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD))
    if forks:
        allow("fork")
        allow("clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_SHARED, 0))
        allow("prctl", seccomp.Arg(0, seccomp.EQ, PR_SET_SECCOMP))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read().hex()


@functools.cache
def interpreter() -> tuple[str, tuple[str, ...]]:
    """The base Python of this one (without its packages), and the paths that it has to read."""
    base = Path(sys.base_prefix).resolve()
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    paths = {str(executable), sysconfig.get_path("stdlib"), *LIBRARIES}
    paths.add(sysconfig.get_path("platstdlib", vars={"platbase": str(base)}))
    shared = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if all(shared):
        paths.add(os.path.join(*shared))
    paths |= {str(path) for path in (base / "lib").glob("libpython3*.so*")}
    return str(executable), tuple(sorted(path for path in paths if path and Path(path).exists()))


def package_folders(path: str) -> list[str]:
    """Folders of installed packages below a folder with Python's own library, or with one of
    several Pythons (`/usr/lib`)."""
    inner = [entry for entry in sorted(Path(path).glob("python*")) if entry.is_dir()]
    return [
        str(top / name)
        for top in (Path(path), *inner)
        for name in PACKAGES
        if (top / name).is_dir()
    ]


@functools.cache
def without_packages(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(folders whose names can be listed, paths that can be read) so that of `paths` installed
    packages cannot be read.

    Landlock adds rights and takes none back, so a folder that holds packages is named by what else
    is in it.
    """
    listed, readable = [], []
    for path in dict.fromkeys(paths):
        hidden = set(package_folders(path))
        around = {path, *map(os.path.dirname, hidden)} if hidden else set()
        listed += sorted(around)
        if not hidden:
            readable.append(path)
        for folder in sorted(around):
            entries = (os.path.join(folder, name) for name in sorted(os.listdir(folder)))
            readable += [entry for entry in entries if entry not in hidden | around]
    return listed, readable


@dataclass(frozen=True)
class Isolation:
    """One kind of isolation. `command` gives the command of an isolated process; starts nothing."""

    kind: Kind
    readable: tuple[str, ...] = field(default_factory=lambda: interpreter()[1])

    def command(
        self,
        role: Role,
        limits: Limits,
        pipes: Mapping[str, int],
        argv: Sequence[str] = (),
        packages: Sequence[str] = (),
    ) -> list[str]:
        """The command of an isolated process.

        Args:
            role: what it does, see `init`.
            pipes: file descriptors that it inherits, by the role's names for them; `text` holds the
                program, to `ready` it writes a byte once it is isolated.
            argv: for `exec` the program to become, an absolute path first; for `scorer` its kind.
            packages: files and folders of installed packages that can be read too, for a `scorer`
                only.
        """
        readable = (*self.readable, str(INIT), *(argv[:1] if role == "exec" else ()))
        listed: list[str] = []
        allowed: list[str] = []
        if self.kind == "landlock":
            listed, allowed = without_packages((*readable, *DEVICES, "/etc/ld.so.cache"))
            listed = [*listed, *dict.fromkeys(map(os.path.dirname, packages))]
        # Landlock cannot bound what is written
        scratch = limits.scratch if self.kind == "bubblewrap" else 0
        job = {
            "role": role,
            "argv": list(argv),
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory,
            "scratch": scratch,
            "mount": self.kind == "bubblewrap",
            "filter": call_filter(role == "exec", role == "scorer"),
            "inner_filter": call_filter() if role == "scorer" else "",
            "landlock": [*allowed, *packages] if self.kind == "landlock" else [],
            "listed": listed,
            "packages": list(dict.fromkeys(map(os.path.dirname, packages))),
            **pipes,
        }
        start = [interpreter()[0], "-I", "-S", "-B", str(INIT), json.dumps(job)]
        return (
            [*self._namespaces(readable, packages), *start] if self.kind == "bubblewrap" else start
        )

    def _namespaces(self, readable: Sequence[str], packages: Sequence[str]) -> list[str]:
        executable = shutil.which("bwrap")
        if executable is None:
            raise SandboxError(
                "bubblewrap is not installed (Debian, Ubuntu: apt install bubblewrap)"
            )
        command = [
            executable,
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
        ]
        # The right to mount is for /tmp alone: `init` gives it up before anything runs.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "cage"]
        for name, value in ENVIRONMENT.items():
            command += ["--setenv", name, value]
        for path in dict.fromkeys(readable):
            resolved = os.path.realpath(path)
            command += ["--ro-bind", resolved, path]
            if path != resolved and os.path.isfile(resolved):
                command += ["--ro-bind", resolved, resolved]
        hidden = [folder for path in dict.fromkeys(readable) for folder in package_folders(path)]
        for folder in hidden:
            command += ["--tmpfs", folder]
        for path in packages:
            command += ["--ro-bind", path, path]
        for folder in hidden:
            command += ["--remount-ro", folder]
        for device in DEVICES:
            command += ["--dev-bind", device, device]
        return [*command, "--dir", "/tmp", "--remount-ro", "/", "--"]


def text_file(text: str) -> int:
    """A file descriptor of an anonymous file in memory that holds a text. The caller closes it."""
    handle = os.memfd_create("program")
    with os.fdopen(os.dup(handle), "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
