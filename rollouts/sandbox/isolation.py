"""Cages for processes that run what a model wrote: two ways to build one, a filter of system calls,
and the proof that it holds.

`bubblewrap`: namespaces of its own (files, processes, network, users), read-only Python and system
libraries and nothing else, a sized `/tmp` if asked for. `landlock`, where user namespaces are off:
the host's files, of which only the same can be read and none written; reduced, for names and sizes
of other files can be told. Both: every capability dropped, an allow-list of system calls (no
process, no socket, no signal, no io_uring), hard limits, an empty environment, death with the
parent.

Which one holds here is found out by attacking it (`proof.py`), not by looking for a binary; where
none holds, nothing is run.
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

# What Python needs, and nothing that reaches another process, another machine or the kernel's rarer
# corners.
CALLS = """
read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 socketpair
open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs readlink readlinkat getdents64
getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync fdatasync flock fadvise64 fallocate
sendfile copy_file_range
mmap munmap mremap mprotect madvise brk mincore msync membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending sigaltstack alarm setitimer getitimer pause
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
futex set_robust_list get_robust_list set_tid_address rseq sched_yield sched_getaffinity gettid getpid getppid getuid geteuid getgid getegid
getresuid getresgid getgroups getpgrp getpgid getsid getrlimit getrandom uname sysinfo arch_prctl restart_syscall
exit exit_group
"""
FCNTL = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    1030,
    1032,
)  # duplicate, flags, locks, size of a pipe; F_SETOWN would send signals
IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # is it a terminal, bytes to read, blocking, inheritance
PR_SET_SECCOMP = 22
PRCTL = (
    15,
    16,
    0x53564D41,
)  # a thread's name, names of memory; the signal at the parent's death stays
CLONE_THREAD = 0x00010000
CLONE_SHARED = 0x7E032F00 | CLONE_THREAD  # whatever a fork shares with its parent, and namespaces
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
    """The allow-list as the kernel reads it, in hex. `executes`: may also become another program,
    and start threads. `forks`: may copy itself, wait for the copy, and load a second, narrower
    filter in it.

    What is not listed fails with EPERM; calls of another architecture end the process.
    """
    seccomp = _seccomp()
    made = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))

    def allow(name: str, *arguments: Any, action: int = seccomp.ALLOW) -> None:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
        if number >= 0:  # some architectures lack some
            made.add_rule(action, number, *arguments)

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
        allow(
            name, seccomp.Arg(0, seccomp.EQ, 0)
        )  # its own alone, and raising a hard limit takes a capability
    allow(
        "clone3", action=seccomp.ERRNO(errno.ENOSYS)
    )  # the C library then uses clone, whose flags can be looked at
    if executes:
        allow("clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD))
    if forks:
        allow("fork")
        allow("clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_SHARED, 0))
        allow("prctl", seccomp.Arg(0, seccomp.EQ, PR_SET_SECCOMP))
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read().hex()


@functools.cache
def interpreter() -> tuple[str, tuple[str, ...]]:
    """The bare Python under this one, and what it has to be able to read."""
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
    """One way of confining processes. `command` says how to start one; nothing is started here."""

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
        """The command of a caged process.

        Args:
            role: what it does, see `warden.py`.
            pipes: file descriptors handed down, by the role's names for them; `text` holds the
                program, to `ready` it writes a byte when it is shut in. argv: what `exec` becomes,
                an absolute path first; what kind of `scorer` it is.
            packages: files and folders of installed packages that can be read too, for a `scorer`
                alone.
        """
        readable = (*self.readable, str(INIT), *(argv[:1] if role == "exec" else ()))
        listed: list[str] = []
        allowed: list[str] = []
        if self.kind == "landlock":
            listed, allowed = without_packages((*readable, *DEVICES, "/etc/ld.so.cache"))
            listed = [*listed, *dict.fromkeys(map(os.path.dirname, packages))]
        scratch = (
            limits.scratch if self.kind == "bubblewrap" else 0
        )  # Landlock cannot bound what is written
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
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxError(
                "bubblewrap is not installed (Debian, Ubuntu: apt install bubblewrap)"
            )
        command = [
            found,
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
        ]
        # The right to mount is for /tmp alone: `warden.py` gives it up before anything runs.
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
    """A file descriptor from which a program can be read; no name, no disk. The caller closes
    it."""
    handle = os.memfd_create("program")
    with os.fdopen(os.dup(handle), "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
