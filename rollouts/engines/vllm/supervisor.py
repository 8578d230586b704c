"""Process supervisor: runs one server and ends its process group when its owner is gone.

`python -P supervisor.py OWNER_PID LOG COMMAND...`, run as a script. The owner holds the other end
of our standard input: when it closes (stop, exit, SIGKILL) the server's process group is ended. An
owner that forked leaves that pipe open in its children, so the parent's id is watched as well. A
supervisor is needed because the kernel's parent-death signal follows the *thread* that started a
process, and an owner may start servers from any thread. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from typing import Protocol

GRACE = 10.0  # seconds between asking the server to end and ending it
POLL = 0.2
PR_SET_PDEATHSIG = 1


def die_with_supervisor() -> None:
    """Runs in the server's process before its program: if the supervisor itself is killed, so is
    the server.

    The supervisor ignores SIGINT, and its owner may have been started with signals ignored; the
    server inherits neither.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Process(Protocol):
    """What a process is ended by: a `subprocess.Popen`, or a fork."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


def end(server: Process) -> None:
    """End the server's process group: SIGTERM, wait, then SIGKILL. Its id is that of a process
    started here."""
    deadline = time.monotonic() + GRACE
    asked = server.poll() is not None  # a server that ended by itself leaves only strays
    while group_alive(server.pid):
        if not asked:
            os.killpg(server.pid, signal.SIGTERM)
            asked = True
        if server.poll() is not None or time.monotonic() > deadline:
            os.killpg(server.pid, signal.SIGKILL)
        time.sleep(POLL / 4)
        server.poll()  # reap, so that the group can vanish
    server.wait()


def main(argv: list[str]) -> int:
    owner, log, command = int(argv[0]), argv[1], argv[2:]
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "ab") as out:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=die_with_supervisor,  # safe: this process has one thread
        )
    while not stopping and server.poll() is None and os.getppid() == owner:
        if select.select([0], [], [], POLL)[0] and not os.read(0, 1):
            break
    end(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
