"""Process group of one training run: rank 0 decides and stores, every rank plays and trains.

Control traffic (JSON, flags) goes through a gloo group of its own with a long time-out, because
rank 0 may play for an hour while the others wait. Adapter gradients are small: they are summed
directly, without a wrapper around the model. No rank waits for ever: see `watchdog.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...agents.types import from_json, to_json
from ...rollouts.ledger import BudgetSpent
from ..errors import Stopped
from .messages import Connection
from .watchdog import Watchdog

T = TypeVar("T")


# what ends a run in order raises the same on every rank
PASSED_ON: Mapping[str, type[BaseException]] = {"Stopped": Stopped, "BudgetSpent": BudgetSpent}


class RankError(RuntimeError):
    """Rank 0 cannot go on; it has said why itself."""


class Ranks:
    """One process or many; every method is a no-op for one. Made by `accelerate launch` or
    `torchrun` (their environment variables).

    `hours` bounds how long a rank waits for what rank 0 does alone, `seconds` how long for others
    in an update; what takes longer hangs, and the watchdog ends all ranks. `warning`: what people
    should know about how it was launched, or "".
    """

    _made = 0

    def __init__(self, hours: float = 12.0, seconds: float = 1800.0) -> None:
        from accelerate import PartialState

        cpu = (
            os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
            or not torch.cuda.is_available()
        )
        slack = datetime.timedelta(
            seconds=2 * seconds + 600
        )  # so that the watchdog, which says more, is first
        self._state = PartialState(cpu=cpu, timeout=slack)
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device = self._state.device
        self._control = self._messages = None
        # is a base split over the ranks, so that all have to make the same passes through it?
        self.lockstep = False
        self.joined: dict[
            str, Callable[..., Any]
        ] = {}  # what every rank does when rank 0 asks for it, see `together`
        # On a CPU, `accelerate launch --num_processes N` names a meeting place for N processes and
        # starts one (without mpirun).
        meant = (
            "MASTER_PORT" in os.environ
            and "WORLD_SIZE" not in os.environ
            and cpu
            and self.size == 1
        )
        self.warning = (
            "accelerate has started one process: on a CPU it leaves more to mpirun; "
            "`torchrun --standalone --nproc_per_node N recipes/NAME.py` starts N"
            if meant
            else ""
        )
        self.hours, self.seconds, self._watchdog = hours, seconds, None
        if self.size > 1:
            long = datetime.timedelta(hours=hours) + slack
            self._control = dist.new_group(backend="gloo", timeout=long)
            self._messages = dist.new_group(backend="gloo", timeout=long)
            Ranks._made += 1
            self._watchdog = Watchdog(
                f"watchdog-{Ranks._made}", self.rank, self.size, max(seconds, 60.0)
            )

    def _joining(
        self, what: str, seconds: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """A collective of this name, which may take `seconds` (None: those of an update)."""
        return (
            self._watchdog.waiting(what, seconds or self.seconds)
            if self._watchdog
            else contextlib.nullcontext()
        )

    @property
    def main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank (others pass anything). They wait for it as long as
        rank 0 may take for what it does alone."""
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.main else b""
        size = torch.tensor([len(data)])
        with self._joining("broadcast by rank 0", None if self.main else self.hours * 3600):
            dist.broadcast(size, 0, group=self._control)
            buffer = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if self.main
                else torch.empty(int(size), dtype=torch.uint8)
            )
            dist.broadcast(buffer, 0, group=self._control)
        return json.loads(bytes(buffer.numpy().tobytes()))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 alone do `work`; its JSON value on every rank. If it fails or is stopped
        there, every rank raises.

        Without this the others would wait for hours for a rank that has gone. Raises what `work`
        raises on rank 0, and `RankError`, `Stopped` or `BudgetSpent` elsewhere.
        """
        if self.size == 1:
            return work()
        if not self.main:
            value, problem, asked = self.broadcast(None)
            while asked:
                self.joined[asked[0]](*asked[1:])
                value, problem, asked = self.broadcast(None)
            if problem:
                kind, _, text = problem.partition(": ")
                raise PASSED_ON[kind](text) if kind in PASSED_ON else RankError(problem)
            return value
        try:
            value = work()
        except BaseException as error:
            name = type(error).__name__
            problem = f"{name}: {error}" if name in PASSED_ON else f"rank 0: {name}: {error}"
            try:
                self.broadcast((None, problem, None))
            except RuntimeError as gone:  # it must not hide what has gone wrong here
                error.add_note(f"the other ranks could not be told: {gone}")
            raise
        return self.broadcast((value, "", None))[0]

    def share(
        self,
        produce: Callable[[], Sequence[T]],
        kind: type[T],
        encode: Callable[[T], Any] = to_json,
        decode: Callable[[Any], T] | None = None,
    ) -> list[T]:
        """What rank 0 alone produces, a list of dataclasses of this kind, on every rank. If it
        fails there, every rank raises, see `on_main`. `encode` and `decode`: one of them to JSON
        and back, in their order; as `to_json` and `from_json` do if not given."""
        produced: list[T] = []

        def work() -> list[Any]:
            produced.extend(produce())
            return [encode(value) for value in produced] if self.size > 1 else []

        sent = self.on_main(work)
        decode = decode or functools.partial(from_json, kind)
        return produced if self.main else [decode(value) for value in sent]

    def together(self, name: str, *args: Any) -> Any:
        """Inside the work of `on_main`: let every rank do `joined[name]` with these JSON arguments,
        this one too; its result here."""
        if self.size > 1:
            self.broadcast((None, "", (name, *args)))
        return self.joined[name](*args)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._joining("gather"):
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
            longest = max(int(size) for size in sizes)
            padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self._control)
        return [
            json.loads(part.numpy().tobytes()[: int(size)])
            for part, size in zip(parts, sizes, strict=True)
        ]

    def connection(
        self, peer: int, received: Callable[[Any], None], lost: Callable[[str], None]
    ) -> Connection:
        """A connection to another rank, for messages beside the collectives; both ranks make
        one."""
        return Connection(self._messages, peer, received, lost)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add the tensors over all ranks, in place, as one flat float32 vector."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().float().flatten() for t in tensors])
        with self._joining("sum of gradients"):
            dist.all_reduce(flat)
            if flat.is_cuda:  # queued so far: what hangs has to hang here
                torch.cuda.current_stream(flat.device).synchronize()
        start = 0
        for t in tensors:
            t.copy_(flat[start : start + t.numel()].view_as(t))
            start += t.numel()

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true on some rank."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        with self._joining("vote"):
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control)
        return bool(value.item())

    def barrier(self) -> None:
        if self.size > 1:
            with self._joining("barrier"):
                dist.barrier(group=self._control)


def has_accelerator() -> bool:
    """Whether this process could use an accelerator, such as a GPU."""
    return torch.accelerator.is_available()
