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


class Stop:
    """Set by the first SIGINT, SIGTERM or SIGUSR1 (what clusters send before the time limit); a second SIGINT interrupts at once.

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
        """The coroutine's result. If `stop` is asked meanwhile, the work is cancelled and KeyboardInterrupt raised."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            while True:
                try:
                    return future.result(timeout=0.2)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        return future.result()  # the work's own time-out
                    if stop is not None and stop.asked:
                        raise KeyboardInterrupt from None
        except KeyboardInterrupt:
            future.cancel()
            concurrent.futures.wait([future], timeout=10)
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()
