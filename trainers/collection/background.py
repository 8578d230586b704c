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
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

from ..errors import Stopped

T = TypeVar("T")


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
    noticed between two steps or while episodes are played. A second SIGINT interrupts at once,
    wherever the run is, so nothing can be saved then.

    Handlers are installed in the main thread only and put back by `close`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers = contextlib.ExitStack()
        self._handlers.enter_context(
            handled(self._handle, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print(
            "stopping: the last finished step will be saved (Ctrl-C again stops at once)",
            file=sys.stderr,
        )

    def close(self) -> None:
        self._handlers.close()


class BackgroundTask(Generic[T]):
    """A coroutine at work in the loop of another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._started: concurrent.futures.Future[asyncio.Task[T]] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

        def begin() -> None:
            task = loop.create_task(coroutine)
            task.add_done_callback(self._end)
            self._started.set_result(task)

        loop.call_soon_threadsafe(begin)

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # looked at, so that asyncio does not warn of work that was given up
            task.exception()
        self._ended.set_result(None)

    def result(self, stop: StopSignal | None = None) -> T:
        """What came of it, once it has. If `stop` is asked meanwhile, the work is cancelled and
        waited for, and `Stopped` raised."""
        try:
            while not concurrent.futures.wait([self._ended], timeout=0.2).done:
                if stop is not None and stop.asked:
                    raise Stopped
        except KeyboardInterrupt:
            self.cancel()
            raise
        result = self._started.result().result()
        if stop is not None and stop.asked:
            raise Stopped
        return result

    def cancel(self) -> None:
        """End it and wait until it has ended: what is open ends before the caller saves or closes
        anything."""
        self._loop.call_soon_threadsafe(self._started.result().cancel)
        concurrent.futures.wait([self._ended], timeout=10)


class BackgroundLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="marlora-loop", daemon=True
        )
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> BackgroundTask[T]:
        """Let it work beside the caller."""
        return BackgroundTask(self.loop, coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T], stop: StopSignal | None = None) -> T:
        """The coroutine's result, see `Work.result`."""
        return self.start(coroutine).result(stop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()
