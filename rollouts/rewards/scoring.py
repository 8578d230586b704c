"""Runs reward functions on an episode; a reward that fails makes the episode unscorable."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from numbers import Real
from typing import Any

from ...agents.execution import SandboxError
from ...agents.types import Reward, Task
from ..types import Episode

RewardFn = Callable[[Task, Episode], Any]
MAX_ERROR = 2000  # characters of an error that become a reward's text
TIMEOUT = 600.0  # seconds that each reward of an episode may take


async def score(
    task: Task, episode: Episode, rewards: Sequence[RewardFn], timeout: float = TIMEOUT
) -> tuple[Reward, ...]:
    """All rewards of an episode, in the order of the functions.

    A reward that raises, or returns what is not a reward, becomes a `Reward` of value NaN whose
    text names the function and what went wrong; NaN and infinity become NaN likewise, and so does
    one that takes longer than `timeout` seconds (an async one: a function that blocks cannot be
    stopped). The episode is kept and is unscorable. Where programs cannot be run at all
    (`SandboxError`), that concerns the whole run and is raised.
    """
    results = await asyncio.gather(*(_score(task, episode, fn, timeout) for fn in rewards))
    return tuple(reward for several in results for reward in several)


async def _score(task: Task, episode: Episode, fn: RewardFn, timeout: float) -> list[Reward]:
    clock = asyncio.timeout(timeout)
    try:
        async with clock:
            result = await awaited(fn(task, episode))
        return [_finite(fn, reward) for reward in _rewards(fn, result)]
    except SandboxError:
        raise
    except Exception as error:  # any failure of a reward is data of this episode
        why = (
            f"not there after {timeout:g} s (reward_timeout)"
            if clock.expired()
            else f"{type(error).__name__}: {str(error)[:MAX_ERROR]}"
        )
        return [Reward(fn_name(fn), math.nan, f"reward {fn_name(fn)!r} failed: {why}")]


def _rewards(fn: RewardFn, result: Any) -> list[Reward]:
    if isinstance(result, Reward):
        return [result]
    if callable(getattr(result, "item", None)):  # a scalar of numpy or torch
        result = result.item()
    if isinstance(result, Real):  # bool too
        return [Reward(fn_name(fn), float(result))]
    if isinstance(result, (list, tuple)) and all(isinstance(each, Reward) for each in result):
        return list(result)
    raise TypeError(f"expected a Reward, several, a number or a bool, got {result!r:.80}")


def _finite(fn: RewardFn, reward: Reward) -> Reward:
    value = float(reward.value)
    if math.isfinite(value):
        return dataclasses.replace(reward, value=value)
    error = f"reward {fn_name(fn)!r} gave {value}"
    return dataclasses.replace(
        reward, value=math.nan, text=f"{error}: {reward.text}" if reward.text else error
    )


async def awaited(value: Any | Awaitable[Any]) -> Any:
    """A value, or what an awaitable gives."""
    return await value if inspect.isawaitable(value) else value


def fn_name(fn: Callable[..., Any]) -> str:
    """Name of a reward function, and of its reward if it returns a bare number."""
    return getattr(fn, "__name__", type(fn).__name__)
