"""A program that was started with signals ignored (`command &` in a script, `nohup command &`) can
still be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marlora.recipes.launch import processes
from marlora.rollouts.engines.vllm import supervisor
from marlora.trainers.collection.background import StopSignal, handled, stoppable

WAITS = """
import sys, time
from marlora.recipes.cli import main as cli
from marlora.recipes.launch import settings
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[1] == "recipe":
    settings.run(wait)
cli.cmd_doctor = wait
cli.main(["doctor"])
"""
LOOPS = """
import asyncio
from marlora.trainers.collection.background import BackgroundLoop, StopSignal
from marlora.trainers.errors import Stopped
stop, background = StopSignal(), BackgroundLoop()
print("ready", flush=True)
try:
    background.run(asyncio.sleep(60), stop)
except Stopped:
    print("saved", flush=True)
"""


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A program started as a shell without job control starts it under nohup: INT, TERM and HUP are
    ignored."""
    command = [
        "sh",
        "-c",
        "trap '' INT TERM HUP; exec \"$@\"",
        "sh",
        sys.executable,
        "-c",
        script,
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    """Exit code and words of a program that got a hang-up, which it ignores, and then this
    signal."""
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    "kind, words",
    [("recipe", "interrupted: go on from the newest checkpoint"), ("command", "stopped")],
)
def test_sigint_interrupts(kind: str, words: str) -> None:
    code, _, said = ended(started(WAITS, kind), signal.SIGINT)
    assert code == 1 and said.splitlines()[-1].startswith(words)


@pytest.mark.parametrize("kind", ["recipe", "command"])
def test_sigterm_ends_it(kind: str) -> None:
    assert ended(started(WAITS, kind), signal.SIGTERM)[0] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_run_notices_every_signal_that_asks_it_to_stop(number: int) -> None:
    code, said, _ = ended(started(LOOPS), number)
    assert (code, said) == (0, "saved\n")


def test_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        stop = StopSignal()
        assert signal.getsignal(signal.SIGINT) == stop._handle
        stop.close()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_ones_own_is_left_alone() -> None:
    def mine(number: int, frame: object) -> None: ...

    with handled(mine, (signal.SIGINT, signal.SIGTERM)), stoppable():
        assert signal.getsignal(signal.SIGINT) is mine and signal.getsignal(signal.SIGTERM) is mine


def test_in_another_thread_nothing_is_installed_and_nothing_fails() -> None:
    found: list[object] = []

    def work() -> None:
        with stoppable():
            stop = StopSignal()
            found.append(signal.getsignal(signal.SIGINT))
            stop.close()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [signal.SIG_IGN]


def test_a_server_of_a_deaf_owner_can_be_asked_to_end(tmp_path: Path) -> None:
    """What keeper.py starts has the usual SIGINT and SIGTERM, whatever the keeper's own owner was
    started with."""
    log = tmp_path / "log"
    shown = (
        "import signal; print([signal.getsignal(n) != signal.SIG_IGN for n in (signal.SIGINT,"
        " signal.SIGTERM)])"
    )
    keep = [
        sys.executable,
        "-P",
        supervisor.__file__,
        str(os.getpid()),
        str(log),
        sys.executable,
        "-c",
        shown,
    ]
    deaf = ["sh", "-c", "trap '' INT TERM HUP; exec \"$@\"", "sh", *keep]
    with subprocess.Popen(
        deaf, stdin=subprocess.PIPE
    ) as kept:  # its end of the pipe, open, says that the owner lives
        assert kept.wait(30) == 0
    assert log.read_text() == "[True, True]\n"


@pytest.mark.parametrize("ignored", [True, False])
def test_ranks_outlive_a_hang_up_as_nohup_asks(
    ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun handles SIGHUP unless told otherwise."""
    for name in ("WORLD_SIZE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(processes, "meant", lambda environ, launcher: 2)
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, argv: became.append(argv))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        processes.start_all()
        assert "torch.distributed.run" in became[0]
        assert os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE") == (
            "SIGTERM,SIGINT,SIGQUIT" if ignored else None
        )
    finally:
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
        signal.signal(signal.SIGHUP, before)
