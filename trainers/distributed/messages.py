"""Messages between two ranks, beside the collectives: JSON values, at any time and in both
directions.

Collectives need both ranks at the same place of the program. Rank 0 asks the others to play while
their main threads wait for it, or train, so that what it asks and what they answer goes through
threads of its own, point to point, over a process group that nothing else uses.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

FAREWELL = 10.0  # seconds that a connection's end is waited for


class Connection:
    """The connection to one other rank; both ranks make one.

    Args:
        group: a gloo group of all ranks, used for messages only.
        peer: the other rank.
        received: is given every message, in order, in a thread of the connection.
        lost: is told why, in that thread, if the connection breaks, or the other rank closes it
            before this one does.
    """

    def __init__(
        self, group: Any, peer: int, received: Callable[[Any], None], lost: Callable[[str], None]
    ) -> None:
        self.peer, self._group = peer, group
        self._received, self._lost = received, lost
        self._closing = False
        self._outbox: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"marlora-rank-{peer}-{name}", daemon=True)
            for name, work in (("send", self._send_all), ("receive", self._receive_all))
        ]

    def begin(self) -> None:
        """Send and receive from now on."""
        for thread in self._threads:
            thread.start()

    def send(self, message: Any) -> None:
        """Send a JSON value, without waiting; from any thread. Raises `TypeError` or `ValueError`
        for what is none."""
        self._outbox.put(json.dumps(message))

    def close(self) -> None:
        """Send what is left and a farewell, and wait for the other rank's, which it sends when it
        closes too. A connection that is broken, or whose peer hangs, is left behind."""
        self._closing = True
        self._outbox.put("")
        for thread in self._threads:
            thread.join(FAREWELL)

    def _send_all(self) -> None:
        """Send what is in the outbox, all that waits at once, until the farewell: no message."""
        try:
            farewell = False
            while not farewell:
                waiting = [self._outbox.get()]
                while not self._outbox.empty():
                    waiting.append(self._outbox.get())
                farewell = "" in waiting
                if messages := [one for one in waiting if one]:
                    self._send(messages)
            self._send([])
        except RuntimeError as error:
            self._lost(first_sentence(error))

    def _send(self, messages: Sequence[str]) -> None:
        data = bytearray(f"[{','.join(messages)}]".encode())
        content = torch.frombuffer(data, dtype=torch.uint8)
        dist.send(torch.tensor([len(content)]), self.peer, group=self._group)
        dist.send(content, self.peer, group=self._group)

    def _receive_all(self) -> None:
        size = torch.zeros(1, dtype=torch.long)
        while True:
            try:
                dist.recv(size, self.peer, group=self._group)
                content = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(content, self.peer, group=self._group)
            except RuntimeError as error:
                self._lost(first_sentence(error))
                return
            messages = json.loads(content.numpy().tobytes())
            if not messages:
                if not self._closing:
                    self._lost("it has ended")
                return
            for message in messages:
                self._received(message)


def first_sentence(error: RuntimeError) -> str:
    """What gloo says, without the line of its source and its guesses."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]
