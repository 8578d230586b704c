"""What an episode has cost, by kind, agent and policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..agents.types import Turn, Usage, to_json
from .types import Episode

Key = tuple[str, str, str]  # kind, agent, policy
Booked = dict[Key, Usage]


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
            sum((_reported(turn) for turn in turns if turn.policy == policy), Usage())
            for policy in policies
        ]
        for policy, share in zip(policies, _shares(usage, reported), strict=True):
            booked[episode.kind, agent, policy] = share
    return booked


def _reported(turn: Turn) -> Usage:
    """What a turn says of its own call; the tokens it holds where no server said anything. A call
    is counted with the first of its samples."""
    if turn.usage is not None:
        return turn.usage
    return Usage(
        calls=int(turn.sibling == 0),
        prompt_tokens=len(turn.prompt_ids),
        sampled_tokens=len(turn.token_ids),
    )


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
