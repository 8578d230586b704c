"""Episodes that follow from others: played after a step's own, stored as their children, and given
to every rank.

A repair of a failed episode is one. What is stored for an episode is all that follows from it or
nothing, so that a resumed run takes it as it is, or plays it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

from ...agents.concurrency import gather
from ...agents.types import from_json, to_json
from ...rollouts.types import Episode
from ..loop.run import Run

Derivation = Callable[[Episode], Awaitable[list[Episode]]]


def is_derived(episode: Episode, what: str) -> bool:
    """Was it played as a follow-up of this kind? Its group is named `PARENT/what/...`."""
    return episode.parent is not None and episode.group.startswith(f"{episode.parent}/{what}/")


def derive(
    run: Run, step: int, episodes: Sequence[Episode], what: str, more: Derivation
) -> list[Episode]:
    """What follows from each episode, in their order, on every rank.

    Args:
        what: the kind, a word.
        more: plays what follows from one episode (on rank 0), in groups named `PARENT/what/...`. At
            most `max_concurrency` at once.
    """
    start = time.perf_counter()
    found: list[Episode] = []

    def play() -> list[object]:
        stored: dict[str, list[Episode]] = {}
        for child in run.stage.store.read(parent={e.id for e in episodes}) if episodes else ():
            if is_derived(child, what):
                stored.setdefault(str(child.parent), []).append(child)
        # Played alone, the missing ones would be decoded in other batches: right, but not to the
        # last bit.
        missing = [e for e in episodes if e.id not in stored]
        todo = list(episodes) if missing and run.stage.exact else missing
        room = asyncio.Semaphore(run.config.max_concurrency)

        async def one(episode: Episode) -> None:
            async with room:
                made = [dataclasses.replace(e, parent=episode.id) for e in await more(episode)]
            if episode.id not in stored:
                run.stage.keep(made)
                stored[episode.id] = made

        with run.stage.holding(run.versions):
            run.stage.perform(gather([one(episode) for episode in todo]))
        found.extend(child for e in episodes for child in stored.get(e.id, ()))
        return [to_json(e) for e in found] if run.ranks.size > 1 else []

    sent = run.ranks.on_main(play)
    if not run.ranks.main:
        found = [from_json(Episode, e) for e in sent]
    run.seconds["rollout"] += time.perf_counter() - start
    run.tokens["sampled"] += sum(u.sampled_tokens for e in found for u in e.usage.values())
    return found
