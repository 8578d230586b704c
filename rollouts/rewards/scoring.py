"""Runs reward functions on an episode; a reward that fails makes the episode unscorable."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from ...agents.concurrency import from_outside
from ...agents.execution import SandboxError
from ...agents.types import Reward, SettingError, Task, nearest
from ..types import Episode

RewardFn = Callable[[Task, Episode], Any]
MAX_ERROR = 2000  # characters of an error that become a reward's text
TIMEOUT = 600.0  # seconds that each reward of an episode may take
MAX_REWARD = 1e15  # its square fits the float32 of losses


async def score(
    task: Task, episode: Episode, rewards: Sequence[RewardFn], timeout: float = TIMEOUT
) -> tuple[Reward, ...]:
    """All rewards of an episode, in the order of the functions.

    A reward that raises, or returns what is not a reward, becomes a `Reward` of value NaN whose
    text names the function and what went wrong; NaN and infinity become NaN likewise, and so does
    one that takes longer than `timeout` seconds (an async one: a function that blocks cannot be
    stopped). So do rewards that name an agent or a turn the episode does not have, and rewards of
    one name that two functions give. The episode is kept and is unscorable. Where programs cannot
    be run at all (`SandboxError`), that concerns the whole run and is raised.
    """
    results = await asyncio.gather(*(_score(task, episode, fn, timeout) for fn in rewards))
    given: dict[tuple[Any, ...], str] = {}
    scored: list[Reward] = []
    for fn, several in zip(rewards, results, strict=True):
        for reward in several:
            first, name = given.setdefault(_place(reward), fn_name(fn)), fn_name(fn)
            if first != name:
                why = f"rewards {first!r} and {name!r} both give {reward.name!r}; rename one"
                reward = _unscorable(reward.name, why)
            scored.append(reward)
    return tuple(scored)


def check_names(rewards: Iterable[RewardFn]) -> None:
    """Raise `SettingError` if two reward functions have one name: their rewards would be added
    up."""
    seen: dict[str, RewardFn] = {}
    for fn in rewards:
        name = fn_name(fn)
        if name in seen:
            first, second = (
                f"{each.__module__}:{getattr(each, '__qualname__', type(each).__name__)}"
                for each in (seen[name], fn)
            )
            raise SettingError(
                f"rewards: two functions are called {name!r} ({first} and {second}), and their"
                " values would be added up; name one of them otherwise or leave it out"
            )
        seen[name] = fn


async def _score(task: Task, episode: Episode, fn: RewardFn, timeout: float) -> list[Reward]:
    clock, caller = asyncio.timeout(timeout), asyncio.current_task()
    try:
        async with clock:
            result = await awaited(fn(task, episode))
        return _named(fn, episode, [_finite(fn, reward) for reward in _rewards(fn, result)])
    except SandboxError:
        raise
    except BaseException as error:  # any failure of a reward is data of this episode
        if from_outside(error, caller):
            raise
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
    if abs(value) <= MAX_REWARD:
        return dataclasses.replace(reward, value=value)
    limit = f", expected at most {MAX_REWARD:g} in size" if math.isfinite(value) else ""
    error = f"reward {fn_name(fn)!r} gave {value}{limit}"
    return dataclasses.replace(
        reward, value=math.nan, text=f"{error}: {reward.text}" if reward.text else error
    )


def _named(fn: RewardFn, episode: Episode, rewards: list[Reward]) -> list[Reward]:
    """The rewards, or NaN for each if one names an agent, a turn or a decision that is not there.
    Of an episode without usage and turns it is not known who took part."""
    agents = dict.fromkeys([*episode.usage, *(turn.agent for turn in episode.turns)])
    turns = {(turn.index, turn.sibling): turn.agent for turn in episode.turns}
    decisions = {decision.index for decision in episode.decisions}
    problems = [_absent(reward, agents, turns, decisions) for reward in rewards]
    problem = next(filter(None, problems), "")
    if not problem:
        return rewards
    why = f"reward {fn_name(fn)!r} names {problem}"
    return [
        _unscorable(reward.name, why)
        if absent
        else dataclasses.replace(reward, value=math.nan, text=why)
        for reward, absent in zip(rewards, problems, strict=True)
    ]


def _absent(
    reward: Reward, agents: Collection[str], turns: Mapping[Any, str], decisions: Collection[int]
) -> str:
    """What a reward names that the episode does not have; "" if all of it is there. `turns`: agents
    by (turn, sibling); `decisions`: their indices."""
    who, where = reward.agent, (reward.turn, reward.sibling)
    if who is not None and agents and who not in agents:
        return f"agent {who!r}: no such agent; {nearest(str(who), agents)}"
    if reward.decision is not None and reward.decision not in decisions:
        return f"decision {reward.decision!r}: the episode has {len(decisions)} decisions"
    if reward.turn is None:
        return ""
    if where not in turns:
        return (
            f"turn {reward.turn!r}, sibling {reward.sibling!r}: the episode has {len(turns)} turns"
        )
    if who not in (None, turns[where]):
        return f"turn {reward.turn} of agent {who!r}: that turn is of agent {turns[where]!r}"
    return ""


def zeros(rewards: Iterable[Reward], problem: str) -> tuple[Reward, ...]:
    """The rewards of an episode whose system raised: those of the functions, each worth 0."""
    return tuple(
        dataclasses.replace(reward, value=0.0, text=f"on_error: zero; {problem}")
        for reward in rewards
    )


def _unscorable(name: str, why: str) -> Reward:
    """A reward of the whole team that could not be given."""
    return Reward(name, math.nan, why)


def _place(reward: Reward) -> tuple[Any, ...]:
    """What a reward is about, with its name."""
    return (reward.name, reward.agent, reward.turn, reward.sibling, reward.decision)


def is_missing(answer: Any) -> bool:
    """Whether a gold answer stands for none: null, or NaN as files and tables write it."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


async def awaited(value: Any | Awaitable[Any]) -> Any:
    """A value, or what an awaitable gives."""
    return await value if inspect.isawaitable(value) else value


def fn_name(fn: Callable[..., Any]) -> str:
    """Name of a reward function, and of its reward if it returns a bare number."""
    return getattr(fn, "__name__", type(fn).__name__)
