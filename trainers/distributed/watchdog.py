"""Watchdog of collectives: one that hangs longer than its limit ends the run on every rank, with
the stacks that show why.

A collective that one rank never joins holds all others without a word. So each rank has a thread
that knows for how long its rank has been waiting, and leaves word in a key-value store of how many
collectives it has joined. When one has waited too long it says who is missing; then every rank
writes the stacks of all its threads to stderr and exits with code 1. A rank that cannot run Python
any more (a call that keeps the interpreter to itself) is ended by a timer in C, which needs no
interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

POLL = 0.5  # seconds between two looks
GRACE = 10.0  # seconds that the others have to write their stacks
STAGGER = 0.1  # seconds between the stacks of one rank and the next, so that they are not mixed
FAREWELL = 3.0  # seconds that rank 0 waits at its end, so that no rank asks a store that is gone
CODE = 1


class Watchdog:
    """One per rank, from a thread of its own.

    Args:
        name: of this watch, the same on all ranks and no other's.
        rank, size: mine, and how many there are.
        frozen: seconds after which a rank that runs no Python at all ends.
    """

    def __init__(self, name: str, rank: int, size: int, frozen: float) -> None:
        # A connection of its own to the store in which the ranks have met: another's may be waiting
        # for an answer.
        self._store = dist.PrefixStore(
            f"marlora-{name}", dist.distributed_c10d._get_default_store().clone()
        )
        self.rank, self.size, self.frozen = rank, size, frozen
        self._joined = 0
        self._waiting: tuple[str, float, float] | None = (
            None  # what for, until when, how many seconds in all
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="marlora-watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @contextlib.contextmanager
    def waiting(self, what: str, seconds: float) -> Iterator[None]:
        """This rank joins a collective, which may take so long."""
        self._joined += 1
        self._waiting = (what, time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        """Watch no longer, here and on the other ranks: a process that ends normally has done with
        collectives."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join(timeout=GRACE)
            with contextlib.suppress(dist.DistError):  # the store may have ended first
                self._store.set("bye", "")
                self._gathered("bye", FAREWELL if self.rank == 0 else 0.0)

    def _watch(self) -> None:
        try:
            while not self._closed.wait(POLL):
                faulthandler.dump_traceback_later(self.frozen, exit=True)
                waiting = self._waiting
                self._store.set(
                    f"at/{self.rank}", json.dumps([self._joined, waiting[0] if waiting else ""])
                )
                if self._store.check(["hung"]):
                    time.sleep(STAGGER * self.rank)
                    self._end(f"rank {self.rank} ends too: {self._store.get('hung').decode()}")
                if waiting is not None and time.monotonic() > waiting[1]:
                    why = self._reason(*waiting)
                    self._end(f"error: {why}", tell=why)
                if self._store.check(["bye"]):
                    break
            self._store.set(f"bye/{self.rank}", "")
        except dist.DistError:
            return  # the process that holds the store is gone; collectives notice that themselves
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _reason(self, what: str, until: float, seconds: float) -> str:
        """Which ranks have not come, and what they are at."""
        reports = {rank: self._report(rank) for rank in range(self.size) if rank != self.rank}
        absent = [
            (
                f"rank {rank}, which is at number {at} ({doing})"
                if doing
                else f"rank {rank}, which has been in none since number {at}"
            )
            for rank, (at, doing) in reports.items()
            if at != self._joined
        ]
        return (
            f"hung: rank {self.rank} has waited {seconds:g} s in collective number {self._joined}"
            f" ({what}) for {' and '.join(absent) or 'ranks that have all joined it'}; stacks of"
            " all ranks follow"
        )

    def _report(self, rank: int) -> tuple[int, str]:
        """A rank's last collective: its number, and what it is ("" if it has ended)."""
        if not self._store.check([f"at/{rank}"]):
            return 0, ""
        at, doing = json.loads(self._store.get(f"at/{rank}"))
        return int(at), str(doing)

    def _gathered(self, what: str, seconds: float) -> bool:
        """Wait until every rank has said so, at most so long."""
        end = time.monotonic() + seconds
        while (
            not (there := self._store.check([f"{what}/{rank}" for rank in range(self.size)]))
            and time.monotonic() < end
        ):
            time.sleep(POLL / 10)
        return there

    def _end(self, line: str, tell: str = "") -> None:
        """Say why, write this rank's stacks, `tell` the others, let them write theirs, and exit."""
        print(
            f"{line}\nstacks of rank {self.rank} (process {os.getpid()}):",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        # the rank that holds the store may have ended first
        with contextlib.suppress(dist.DistError):
            if tell:
                self._store.set("hung", tell)
            self._store.set(f"dumped/{self.rank}", "")
            self._gathered("dumped", GRACE)
        os._exit(CODE)
