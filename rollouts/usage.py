"""What an episode has cost, by kind, agent and policy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, sub
from typing import Any

from ..agents.types import Turn, Usage, to_json
from .types import Episode

Key = tuple[str, str, str]  # kind, agent, policy
Booked = dict[Key, Usage]
_NUMBERS = attrgetter(*(field.name for field in dataclasses.fields(Usage)))


def total(usages: Iterable[Usage]) -> Usage:
    """The sum, quick enough to be taken before every call."""
    return Usage(*map(sum, zip(*map(_NUMBERS, usages), strict=True)))


def less(whole: Usage, part: Usage) -> Usage:
    """What is left of a sum without one of its parts."""
    return Usage(*map(sub, _NUMBERS(whole), _NUMBERS(part)))


def usage_by_policy(episode: Episode) -> Booked:
    """An episode's usage by kind, agent and policy. If an agent spoke with several policies, each
    number is shared out as its turns say; the shares add up to the agent's usage."""
    booked: Booked = {}
    for agent, usage in episode.usage.items():
        if usage == Usage():
            continue
        turns = [turn for turn in episode.turns if turn.agent == agent]
        policies = list(dict.fromkeys(turn.policy for turn in turns)) or [""]
        reported = [
            total(_reported(turn) for turn in turns if turn.policy == policy) for policy in policies
        ]
        for policy, share in zip(policies, _shares(usage, reported), strict=True):
            booked[episode.kind, agent, policy] = share
    return booked


def _reported(turn: Turn) -> Usage:
    """What a turn says of its call; the tokens it holds where no server said anything. A call and
    its prompt are counted with the first of its samples."""
    first = turn.sibling == 0
    if turn.usage is not None:
        return dataclasses.replace(turn.usage, calls=int(first))
    prompt = len(turn.prompt_ids) if first else 0
    return Usage(int(first), prompt, len(turn.token_ids))


def _shares(usage: Usage, reported: Sequence[Usage]) -> list[Usage]:
    """`usage` in proportion to the reports, number by number; where they say nothing, all is the
    first one's. Whole numbers stay whole."""
    shares: list[dict[str, Any]] = [{} for _ in reported]
    for name, total in to_json(usage).items():
        sums = list(itertools.accumulate(getattr(each, name) for each in reported))
        before = total - total  # 0 of its type
        for share, up_to in zip(shares, sums, strict=True):
            edge = _part(total, up_to, sums[-1])
            share[name], before = edge - before, edge
    return [Usage(**share) for share in shares]


def _part(total: Any, weight: Any, whole: Any) -> Any:
    """The share `weight / whole` of a number, all of it where `whole` is 0."""
    if weight == whole:
        return total
    if isinstance(total, int):
        return (2 * total * weight + whole) // (2 * whole)
    return total * weight / whole


def book(booked: Booked, key: Key, usage: Usage) -> None:
    """Add a usage to what is booked under this key."""
    booked[key] = booked.get(key, Usage()) + usage


def book_rows(booked: Booked, rows: Iterable[Mapping[str, Any]]) -> None:
    """Book the `unstored` rows of a ledger's state."""
    for row in rows:
        usage = dict(row)
        key = usage.pop("kind"), usage.pop("agent"), usage.pop("policy")
        book(booked, key, Usage(**usage))
