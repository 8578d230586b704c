"""The loop of the rollouts: what user code raises is an episode's error whatever its class, a loop
that has died or is blocked is noticed, and the second signal ends the process."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from marlora.agents.concurrency import from_outside, run_steadily
from marlora.agents.patterns.chain import Chain
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.tools.tools import tool
from marlora.agents.types import Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.gateway.programs import Function
from marlora.rollouts.types import Episode
from marlora.trainers.collection.background import BackgroundLoop, LoopGone, StopSignal
from marlora.trainers.errors import RunError, Stopped
from tests.repository import ROOT


class OfTheUser(BaseException):
    """What no library of ours knows."""


def group() -> BaseException:
    return BaseExceptionGroup("several", [OfTheUser("in a group")])


KINDS: dict[str, Callable[[], BaseException]] = {
    "exit": lambda: SystemExit(3),
    "exit-0": SystemExit,
    "interrupt": KeyboardInterrupt,
    "generator": GeneratorExit,
    "cancelled": asyncio.CancelledError,
    "own": OfTheUser,
    "group": group,
}
WAYS = ("at-once", "awaited", "task", "gathered", "thread")
Way = Callable[[], Coroutine[Any, Any, Any]]
now_raised: Way | None = None  # by `program`, which settings can only name


def raising(kind: str, way: str) -> Way:
    """User code that raises, in itself, or in what it starts."""

    def fail() -> None:
        raise KINDS[kind]()

    async def later() -> None:
        await asyncio.sleep(0)
        fail()

    async def code() -> None:
        if way == "at-once":
            fail()
        elif way == "awaited":
            await later()
        elif way == "task":
            await asyncio.create_task(later())
        elif way == "gathered":
            await asyncio.gather(later(), asyncio.sleep(0.01))
        else:
            await asyncio.to_thread(fail)

    return code


async def program(task: Task, base_url: str, api_key: str) -> str:
    assert now_raised is not None
    await now_raised()
    return ""


@dataclass
class Fails(System):
    """A system that fails in the way that is set at the class."""

    async def run(self, task: Task, team: Team) -> str:
        assert now_raised is not None
        await now_raised()
        return ""


def runner(system: System, rewards: tuple[Any, ...] = ()) -> EpisodeRunner:
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "7")
    completers = {a.policy: EngineCompleter(engine, engine.tokens, a.policy) for a in system.specs}
    return EpisodeRunner(system, completers, rewards)


async def played(player: EpisodeRunner, count: int = 2) -> list[Episode]:
    plan = [EpisodeRequest(Task("t", "?", "7"), "train-1/t", k) for k in range(count)]
    return [episode async for episode in player.collect(plan)]


@pytest.fixture(params=["background", "main"])
def run(request: pytest.FixtureRequest):
    """Work in the loop of a training run, or in the main thread as commands do."""
    if request.param == "main":
        yield run_steadily
        return
    background = BackgroundLoop()
    yield lambda work: background.run(asyncio.wait_for(work, 20))
    background.close()


@pytest.mark.parametrize(
    ("kind", "way"),
    # Python closes every coroutine that waits for a future of GeneratorExit, see below
    [(k, w) for k in KINDS for w in WAYS if k != "generator" or w in ("at-once", "awaited")],
)
def test_what_user_code_raises_is_an_episodes_error(
    run: Any, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a system, a reward (async and plain), a tool and a program; what is played beside it is
    not touched."""
    code, name = raising(kind, way), type(KINDS[kind]()).__name__
    # as a program that was started by somebody else: Python's own handler leaves no trace
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        monkeypatch.setattr(sys.modules[__name__], "now_raised", code)
        for system in (Fails(["a"]), Function(["a"], main=f"{__name__}:program")):
            episodes = run(played(runner(system)))
            assert [name in str(e.error) and e.stop_reason == "error" for e in episodes] == [
                True
            ] * 2

        async def failing(task: Task, episode: Episode) -> float:
            await code()
            return 1.0

        def fine(task: Task, episode: Episode) -> float:
            return 0.5

        for episode in run(played(runner(Chain(["a"]), (failing, fine)))):
            bad, good = episode.rewards
            assert math.isnan(bad.value) and name in bad.text and good.value == 0.5
            assert episode.error is None

        @tool
        async def broken(x: int) -> str:
            """Fail."""
            await code()
            return ""

        assert f"error: broken: {name}" in run(broken({"x": 1}))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_functions_too(run: Any, kind: str) -> None:
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:

        def failing(task: Task, episode: Episode) -> float:
            raise KINDS[kind]()

        for episode in run(played(runner(Chain(["a"]), (failing,)))):
            assert math.isnan(episode.rewards[0].value)

        @tool
        def broken(x: int) -> str:
            """Fail."""
            raise KINDS[kind]()

        assert "error: broken" in run(broken({"x": 1}))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loop_that_user_code_stops_goes_on(run: Any) -> None:
    def stops(task: Task, episode: Episode) -> float:
        asyncio.get_running_loop().stop()
        return 1.0

    assert [e.rewards[0].value for e in run(played(runner(Chain(["a"]), (stops,))))] == [1.0, 1.0]


def test_a_cancellation_of_ours_is_none_of_user_code() -> None:
    """Stopped or timed out, user code ends and leaves no episode behind."""
    background, stop, begun = BackgroundLoop(), StopSignal(), threading.Event()
    ended: list[str] = []

    async def waits(task: Task, episode: Episode) -> float:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("reward")
        return 1.0

    try:
        work = background.start(played(runner(Chain(["a"]), (waits,))))
        assert begun.wait(10)
        stop.asked = True
        with pytest.raises(Stopped):
            work.result(stop)
        assert ended == ["reward"] * 2

        async def timed() -> None:
            async with asyncio.timeout(0.05):
                await played(runner(Chain(["a"]), (waits,)))

        with pytest.raises(TimeoutError):
            background.run(timed())
    finally:
        stop.close()
        background.close()


def test_a_coroutine_that_is_closed_ends() -> None:
    """Closing raises GeneratorExit in it, which is not the user code's."""

    async def body() -> str:
        caller = asyncio.current_task() if holds else None
        try:
            await asyncio.sleep(60)
        except BaseException as error:
            return "kept" if not from_outside(error, caller) else "passed"
        return ""

    holds = False
    coroutine = body()

    async def begin() -> None:
        coroutine.send(None)

    asyncio.run(begin())
    with pytest.raises(StopIteration) as caught:
        coroutine.throw(GeneratorExit())
    assert caught.value.value == "passed"


def test_a_loop_that_died_is_noticed() -> None:
    """Its selector is gone: nothing in it will ever go on."""
    background = BackgroundLoop()

    def gone(timeout: float | None = None) -> list[Any]:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    async def work() -> None:
        background.loop._selector.select = gone  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    start = time.monotonic()
    with pytest.raises(LoopGone, match="has died"):
        background.run(work())
    with pytest.raises(LoopGone, match="has died"):
        background.run(asyncio.sleep(0))
    background.close()
    assert time.monotonic() - start < 5
    background.loop.close()


def test_tasks_that_user_code_cancels_end_the_run_in_one_line() -> None:
    background = BackgroundLoop()

    def cancels(task: Task, episode: Episode) -> float:
        for each in asyncio.all_tasks():
            each.cancel()
        return 1.0

    try:
        with pytest.raises(RunError, match="cancelled by user code"):
            background.run(played(runner(Chain(["a"]), (cancels,))))
    finally:
        background.close()


def test_a_generator_exit_from_a_task_of_user_code_ends_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    background = BackgroundLoop()
    monkeypatch.setattr(sys.modules[__name__], "now_raised", raising("generator", "task"))
    try:
        with pytest.raises(RunError, match="the rollouts ended with GeneratorExit"):
            background.run(played(runner(Fails(["a"]))))
    finally:
        background.close()


def test_user_code_that_blocks_does_not_hold_up_the_end() -> None:
    background, stop, over = BackgroundLoop(), StopSignal(), threading.Event()
    background.patience = 0.5

    async def blocks() -> None:
        stop.asked = True
        over.wait(60)

    start = time.monotonic()
    try:
        with pytest.raises(Stopped):
            background.run(blocks(), stop)
        with pytest.raises(LoopGone, match="blocked by user code"):
            background.run(asyncio.sleep(0))
        background.close()
        assert time.monotonic() - start < 10
    finally:
        over.set()
        stop.close()
        background._thread.join(10)
        background.loop.close()


BLOCKS = """
import asyncio, sys, time
from marlora.trainers.collection.background import BackgroundLoop, StopSignal
stop, background = StopSignal(), BackgroundLoop()
print("ready", flush=True)
while True:  # deaf to the first signal: it looks at nothing
    time.sleep(0.1)
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_second_signal_ends_the_process(first: str, second: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(getattr(signal, first))
        time.sleep(1.3)
        assert process.poll() is None
        process.send_signal(getattr(signal, second))
        _, said = process.communicate(timeout=120)
        assert process.returncode != 0 and b"stopping:" in said
    finally:
        process.kill()
        process.communicate()


def test_a_signal_that_a_launcher_passes_on_is_not_the_second_one() -> None:
    """torchrun ends its ranks by SIGTERM when Ctrl-C has reached all of them."""
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()
