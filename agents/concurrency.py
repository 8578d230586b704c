"""Concurrent coroutines: results in a fixed order, and user code that cannot end the event loop.

User code (rewards, systems, tools, programs) may raise anything: `sys.exit()`, `KeyboardInterrupt`,
`CancelledError`. Whoever calls it catches `BaseException` and asks `from_outside` whether the
exception is the user code's own, which is data, or a cancellation or Ctrl-C that only passes by.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

from .types import T

_STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # signals whose handlers may raise


async def gather(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Await all at once, results in the order given. If one fails, the others are cancelled and its
    error is raised."""
    tasks: list[asyncio.Future[T]] = []
    try:
        for awaitable in awaitables:
            tasks.append(asyncio.ensure_future(awaitable))
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def from_outside(error: BaseException, caller: asyncio.Task[Any] | None) -> bool:
    """Whether an exception that came out of user code was not raised by it: a cancellation of the
    task that called it, the closing of its coroutine, or a signal.

    Args:
        caller: `asyncio.current_task()` when the user code was called.
    """
    if isinstance(error, KeyboardInterrupt):
        return is_interrupt(error)
    if not isinstance(error, (asyncio.CancelledError, GeneratorExit, BaseExceptionGroup)):
        return False
    try:
        now = asyncio.current_task()
    except RuntimeError:  # no loop runs: the coroutine is being closed
        return True
    if now is not caller:
        return True
    cancelled = caller is not None and caller.cancelling() > 0
    return cancelled and not isinstance(error, (GeneratorExit, Exception))


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal raised it: signals are handled in the main thread only, by a handler that
    stands in the traceback, or by Python's own, which leaves no trace there."""
    here = threading.current_thread() is threading.main_thread()
    if not here or not isinstance(error, KeyboardInterrupt):
        return False
    handlers = [signal.getsignal(getattr(signal, name)) for name in _STOPS if hasattr(signal, name)]
    if signal.default_int_handler in handlers:
        return True
    codes = [getattr(getattr(h, "func", h), "__code__", None) for h in handlers]
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


class SteadyLoop(asyncio.SelectorEventLoop):
    """An event loop that goes on where a task or callback raises `SystemExit` or
    `KeyboardInterrupt`, or stops the loop.

    asyncio ends the loop then, and everything that waits in it waits for ever. Here the exception
    is the task's result, as any other; only one that a signal raised ends the loop.
    """

    _main: asyncio.Future[Any] | None = None  # what `run_until_complete` waits for
    _stop_asked = False

    def stop(self) -> None:
        self._stop_asked = True
        super().stop()

    def run_forever(self) -> None:
        while True:
            try:
                super().run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                ended = self._main is not None and self._main.done()
                if ended or is_interrupt(error):
                    raise
                if not self._stop_asked:
                    continue
            self._stop_asked = False
            if self._main is None or self._main.done():
                return

    def run_until_complete(self, future: Any) -> Any:
        before, self._main = self._main, asyncio.ensure_future(future, loop=self)
        try:
            return super().run_until_complete(self._main)
        finally:
            self._main = before


def run_steadily(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in a `SteadyLoop`, for work that calls user code."""
    with asyncio.Runner(loop_factory=SteadyLoop) as runner:
        return runner.run(work)
