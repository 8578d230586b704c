"""The event loop beside the trainer, and the wish to stop.

Engines are asynchronous, trainers are not. The loop lives in a thread of its own, so `train()` also works in a notebook, where a loop
is running already.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import sys
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """The user or the cluster asked to stop, noticed where the last finished step can be saved as it is."""


class Stop:
    """Set by the first SIGINT, SIGTERM or SIGUSR1 (what clusters send before the time limit), and noticed between two steps or while
    episodes are played. A second SIGINT interrupts at once, wherever the run is, so nothing can be saved then.

    Handlers are installed in the main thread only and put back by `close`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping: the last finished step will be saved (Ctrl-C again stops at once)", file=sys.stderr)

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class Background:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="marlora-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], stop: Stop | None = None) -> T:
        """The coroutine's result. If `stop` is asked meanwhile, the work is cancelled and waited for, and `Stopped` raised."""
        started: concurrent.futures.Future[asyncio.Task[T]] = concurrent.futures.Future()
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()

        def begin() -> None:
            task = self.loop.create_task(work)
            task.add_done_callback(lambda _: ended.set_result(None))
            started.set_result(task)

        self.loop.call_soon_threadsafe(begin)
        try:
            while not concurrent.futures.wait([ended], timeout=0.2).done:
                if stop is not None and stop.asked:
                    raise Stopped
        except KeyboardInterrupt:
            task = started.result()
            self.loop.call_soon_threadsafe(task.cancel)
            concurrent.futures.wait([ended], timeout=10)  # what is open ends before the caller saves or closes anything
            raise
        result = started.result().result()
        if stop is not None and stop.asked:
            raise Stopped
        return result

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()
