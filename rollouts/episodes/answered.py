"""Rewards that ask: before an episode is scored, helpers such as judges are asked about it, each in
a talk of its own that is recorded and metered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from ...agents.concurrency import gather
from ...agents.state import TeamState, content_key
from ...agents.types import to_json
from ..rewards.judge import Judge
from ..rewards.scoring import RewardFn
from ..types import Episode


class AsideStore(Protocol):
    """Where the talks with helpers are kept."""

    def find(self, id: str) -> Episode | None:
        """The talk of this id, if it was had before."""
        ...

    def keep(self, episodes: Sequence[Episode]) -> None:
        """Keep these talks."""
        ...


async def answered(player: Any, request: Any, episode: Episode, state: TeamState) -> list[RewardFn]:
    """The reward functions of a runner, those that ask with the answers they got.

    Args:
        player, request: the `EpisodeRunner` and the `EpisodeRequest` of the episode.
        episode: before it is scored.
        state: what it was played with.

    An evaluation's talks are metered as part of it (`eval`), which the budget leaves out; all
    others are asides. A talk's id holds what was asked: another output is another talk.
    """

    async def one(fn: RewardFn) -> RewardFn:
        if not isinstance(fn, Judge):
            return fn
        question = fn.question(request.task, episode)
        if question is None:
            return fn.answered(None)
        system, task = question
        key = content_key([to_json(system.specs), to_json(task)], "task")[:8]
        asked = dataclasses.replace(
            request,
            task=task,
            group=f"{request.id}/{fn.__name__}-{key}",
            sample=0,
            draw="",
            kind="eval" if request.kind == "eval" else "aside",
            follows=request.id,
        )
        return fn.answered(await _talk(player, system, asked, state))

    return list(await gather(one(fn) for fn in player.rewards))


async def _talk(player: Any, system: Any, asked: Any, state: TeamState) -> Episode:
    """The talk, played unless it was had before."""
    store: AsideStore | None = player.asides
    known = store.find(asked.id) if store is not None else None
    if known is not None:
        if player.ledger is not None:
            player.ledger.cached(known)
        return known
    runner = dataclasses.replace(player, system=system, rewards=())
    talk: Episode = dataclasses.replace(await runner.play(asked, state), parent=asked.follows)
    if store is not None:
        store.keep([talk])
    return talk
