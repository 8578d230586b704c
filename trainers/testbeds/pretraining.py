"""Pre-trains the toy models at first use and caches them under a hash of their training code and
settings."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..model.local_models import cache as default_cache

Say = Callable[[str], None]  # gets lines of progress


@dataclass(frozen=True)
class ToyModel:
    """A toy model that is pre-trained on first use and cached.

    name: of its folder, before the hash. train: gives the trained network. save: writes a network
    and its tokenizer into a new folder. sources, facts: functions, classes and values from which
    the weights follow; the folder's name ends with their hash.
    """

    name: str
    train: Callable[[Say], Any]
    save: Callable[[Any, Path], None]
    sources: tuple[Any, ...]
    facts: tuple[Any, ...]

    def recipe_hash(self) -> str:
        """12 hex digits of all that the trained weights follow from."""
        parts = (pretrain, one_thread, *self.sources)
        text = "\n".join([*map(inspect.getsource, parts), repr(self.facts)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def folder(self, cache: Path | None = None, say: Say | None = None) -> Path:
        """The folder of the trained model: from the cache, or trained and put there. Other
        processes wait for the one that trains it.

        Args:
            cache: where to keep it; None means `$MARLORA_CACHE` or `~/.cache/marlora`.
            say: gets a line of progress now and then while it trains.
        """
        root = Path(cache) if cache is not None else default_cache()
        target = root / f"{self.name}-{self.recipe_hash()}"
        if target.is_dir():
            return target
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".tiny.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                staged = root / f".{target.name}.{os.getpid()}"
                self.save(self.train(say or (lambda line: None)), staged)
                staged.rename(target)
        return target


class Schedule(Protocol):
    """How long and how fast `pretrain` goes."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


def pretrain(
    network: Any,
    schedule: Schedule,
    loss_of: Callable[[], tuple[torch.Tensor, float]],
    limit: float,
    say: Say,
    name: str,
) -> Any:
    """Train a network on one thread for `steps`, and on, up to twice as many, until the mean over
    the last 20 is at most `limit`.

    AdamW with warm-up, then linear decay to 5 % of the rate. `loss_of`: the loss of a fresh batch,
    and the number that `limit` bounds. Raises `RuntimeError` if that stays above it.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    numbers: list[float] = []
    with one_thread():
        for step in range(2 * schedule.steps):
            rate = min(1, (step + 1) / schedule.warmup) * max(
                0.05, 1 - 0.95 * step / schedule.steps
            )
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * rate
            loss, number = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            numbers.append(number)
            recent = sum(numbers[-20:]) / len(numbers[-20:])
            if (step + 1) % 20 == 0:
                say(f"{name}: step {step + 1}/{schedule.steps}, {recent:.3f}")
            if step + 1 >= schedule.steps and recent <= limit:
                return network.eval()
    raise RuntimeError(
        f"{name}: {recent:.3f} after {2 * schedule.steps} steps, expected at most {limit}"
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: the order of sums, and so every bit of the weights, depends on the
    number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
