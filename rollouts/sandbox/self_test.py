"""The self-test of an isolation: attacks from inside, tried on this machine before any program of a
model runs."""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile

from ...agents.execution import Limits, SandboxError
from .isolation import Isolation
from .python import run_plain

ATTACKS = r"""
import ctypes, json, os, resource, socket, sys
libc, told = ctypes.CDLL(None, use_errno=True), {}
def attack(name, act):
    try:
        act()
        told[name] = "done"
    except BaseException as error:
        told[name] = type(error).__name__
def called(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
attack("control", lambda: open(os.__file__).read(1))
attack("read a file of ours", lambda: open(PATH).read())
attack("read the passwords", lambda: open("/etc/passwd").read())
attack("write beside it", lambda: open(PATH + "x", "w").write("x"))
attack("write to /dev/shm", lambda: open("/dev/shm/marlora-proof", "w").write("x"))
attack("our environment", lambda: open("/proc/%d/environ" % os.getppid()).read())
attack("fork", lambda: os.fork() or os._exit(0))
attack("another program", lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}))
attack("become another program", lambda: os.execv("/bin/true", ["true"]))
attack("signal", lambda: os.kill(PARENT, 0))
attack("internet", lambda: socket.socket(socket.AF_INET))
attack("unix socket", lambda: socket.socket(socket.AF_UNIX))
attack("netlink", lambda: socket.socket(socket.AF_NETLINK))
attack("trace", lambda: called(101 if os.uname().machine == "x86_64" else 117, 16, PARENT, 0, 0))
attack("io_uring", lambda: called(425, 1, ctypes.create_string_buffer(120)))
attack("namespaces", lambda: called(272 if os.uname().machine == "x86_64" else 97, 0x10000000))
attack("more memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))
attack("memory", lambda: bytearray(MEMORY))
print(json.dumps(told))
"""


def run_self_test(isolation: Isolation) -> None:
    """Attack an isolation from inside. Raises `SandboxError` naming the attacks that succeeded, or
    why nothing ran."""
    limits = Limits(seconds=20.0, cpu_seconds=10, memory=256 << 20)
    with tempfile.NamedTemporaryFile("w", prefix="marlora-proof-", encoding="utf-8") as canary:
        canary.write("canary")
        canary.flush()
        known = f"PATH, PARENT, MEMORY = {canary.name!r}, {os.getpid()}, {2 * limits.memory}\n"
        result = run_plain(isolation, known + ATTACKS, limits)
        written = os.path.exists(canary.name + "x")
    try:
        outcomes = json.loads(result.output)
    except ValueError as error:
        raise SandboxError(
            f"{isolation.kind}: a harmless program does not work in it"
            f" ({result.status}: {result.error})"
        ) from error
    if outcomes.pop("control", "") != "done":
        raise SandboxError(
            f"{isolation.kind}: Python's own library cannot be read inside, so the attacks prove"
            " nothing"
        )
    succeeded = [name for name, outcome in outcomes.items() if outcome == "done"] + (
        ["write beside it"] if written else []
    )
    if succeeded or len(outcomes) != ATTACKS.count("\nattack(") - 1:
        raise SandboxError(
            f"{isolation.kind}: does not hold; what came through:"
            f" {', '.join(succeeded) or 'the report was cut'}"
        )


@functools.cache
def _tried() -> tuple[tuple[Isolation, ...], tuple[str, ...]]:
    if platform.system() != "Linux":
        return (), (f"no isolation of processes on {platform.system()}",)
    working, reasons = [], []
    for kind in ("bubblewrap", "landlock"):
        try:
            run_self_test(each := Isolation(kind))
            working.append(each)
        except SandboxError as error:
            reasons.append(str(error))
    return tuple(working), tuple(reasons)


def isolations() -> tuple[Isolation, ...]:
    """The isolations that hold on this machine, the better one first. Tested once per process."""
    return _tried()[0]


def isolation() -> Isolation:
    """The best isolation that holds on this machine. Raises `SandboxError` with all reasons;
    programs of a model never run without one."""
    if not isolations():
        raise SandboxError(
            "programs of a model cannot be run on this machine: " + "; ".join(_tried()[1])
        )
    return isolations()[0]
