"""A background event loop for rollouts, and the signal that stops a run.

Engines are asynchronous, trainers are not. The loop lives in a thread of its own, so `train()` also
works in a notebook, where a loop is running already.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

from ...agents.concurrency import SteadyLoop
from ..errors import RunError, Stopped

T = TypeVar("T")
APART = 1.0  # seconds between two signals that are not the same one passed on


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any], numbers: tuple[int, ...]
) -> Iterator[None]:
    """Signal handlers for as long as the context lasts; outside the main thread, where Python
    allows none, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for (
            number,
            old,
        ) in (
            before.items()
        ):  # None: a handler that was not installed from Python cannot be put back
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM act as usual even in a program that was started with them ignored.

    Shells without job control start `command &` with SIGINT ignored, and Python then installs no
    handler, so KeyboardInterrupt never comes; programs started from here would inherit the same.
    SIGHUP stays ignored, which is what `nohup` is for.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    with contextlib.ExitStack() as stack:
        for number, handler in usual.items():
            if signal.getsignal(number) == signal.SIG_IGN:
                stack.enter_context(handled(handler, (number,)))  # type: ignore[arg-type]
        yield


class StopSignal:
    """Set by the first SIGINT, SIGTERM or SIGUSR1 (what clusters send before the time limit), and
    noticed between two steps or while episodes are played. A second signal interrupts at once,
    wherever the run is, so nothing can be saved then. Launchers pass on what reached the run
    already: any but a second SIGINT counts only `APART` seconds after the first.

    Handlers are installed in the main thread only and put back by `close`.
    """

    def __init__(self) -> None:
        self.asked, self._first = False, 0.0
        self._handlers = contextlib.ExitStack()
        self._handlers.enter_context(
            handled(self._handle, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT or time.monotonic() - self._first > APART:
                self.close()  # a third one ends the process as it would any other
                raise KeyboardInterrupt
            return
        self.asked, self._first = True, time.monotonic()
        print(
            "stopping: the last finished step will be saved (Ctrl-C again stops at once)",
            file=sys.stderr,
        )

    def close(self) -> None:
        self._handlers.close()


class LoopGone(RunError):
    """The loop of the rollouts has died, or user code blocks it."""


class BackgroundTask(Generic[T]):
    """A coroutine at work in the loop of another thread."""

    def __init__(self, background: BackgroundLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self._background = background
        self._task: asyncio.Task[T] | None = None
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._given_up = False

        def begin() -> None:
            self._task = background.loop.create_task(coroutine)
            self._task.add_done_callback(self._end)

        background.loop.call_soon_threadsafe(begin)

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # looked at, so that asyncio does not warn of work that was given up
            task.exception()
        self._ended.set_result(None)

    def result(self, stop: StopSignal | None = None) -> T:
        """What came of it, once it has. If `stop` is asked meanwhile, the work is cancelled and
        waited for, and `Stopped` raised. Raises `LoopGone` if it will never come."""
        try:
            while not concurrent.futures.wait([self._ended], timeout=0.2).done:
                if stop is not None and stop.asked:
                    raise Stopped
                self._background.check()
        except KeyboardInterrupt:
            self.cancel()
            raise
        assert self._task is not None  # it has ended
        if self._task.cancelled() and not self._given_up:
            raise RunError("the rollouts were cancelled by user code; it may cancel its own tasks")
        error = None if self._task.cancelled() else self._task.exception()
        if error is not None and not isinstance(error, Exception):
            raise RunError(f"the rollouts ended with {type(error).__name__}: {error}") from error
        result = self._task.result()
        if stop is not None and stop.asked:
            raise Stopped
        return result

    def cancel(self) -> None:
        """End it and wait until it has ended: what is open ends before the caller saves or closes
        anything. A loop that has died or that user code blocks is not waited for."""
        self._given_up = True
        background = self._background
        if background.died is not None:
            return
        background.loop.call_soon_threadsafe(self._cancel)
        if concurrent.futures.wait([self._ended], timeout=background.patience).not_done:
            background.watch()

    def _cancel(self) -> None:
        assert self._task is not None  # the loop has begun it before
        self._task.cancel()


class BackgroundLoop:
    """An event loop in a daemon thread.

    User code in it that raises `SystemExit` or `KeyboardInterrupt`, or stops the loop, does not end
    it. `died`: what did.
    """

    def __init__(self) -> None:
        self.loop = SteadyLoop()
        self.died: BaseException | None = None
        self.patience = 10.0  # seconds that the end of cancelled work is waited for
        self._blocked, self._closing = False, False
        self._thread = threading.Thread(target=self._work, name="marlora-loop", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._closing:
                self.loop.run_forever()
        except BaseException as error:
            self.died = error

    def start(self, coroutine: Coroutine[Any, Any, T]) -> BackgroundTask[T]:
        """Let it work beside the caller."""
        try:
            self.check()
        except LoopGone:
            coroutine.close()
            raise
        return BackgroundTask(self, coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T], stop: StopSignal | None = None) -> T:
        """The coroutine's result, see `BackgroundTask.result`."""
        return self.start(coroutine).result(stop)

    def check(self) -> None:
        """Raise `LoopGone` if nothing in the loop will go on."""
        if self.died is not None or not self._thread.is_alive():
            why = f"{type(self.died).__name__}: {self.died}"
            raise LoopGone(f"the event loop of the rollouts has died ({why})") from self.died
        if self._blocked and not self._answers(1.0):
            raise LoopGone(
                "the event loop of the rollouts is blocked by user code (a reward, system or tool"
                " that does not await what it waits for)"
            )

    def watch(self) -> None:
        """Cancelled work has not ended: see whether the loop answers at all from now on."""
        self._blocked, self.patience = not self._answers(1.0), 1.0

    def _answers(self, seconds: float) -> bool:
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(seconds)

    def close(self) -> None:
        """End the loop. One that user code blocks is left behind, in its daemon thread."""
        self._closing = True
        if self.died is None:
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=self.patience)
        if self.died is None and not self._thread.is_alive():
            self.loop.close()


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """What the loop would have to do at the end of a run is left out, and said, if it is gone."""
    try:
        yield
    except LoopGone as error:
        print(f"not closed: {error}", file=sys.stderr)
