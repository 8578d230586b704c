"""Derived episodes: played after a step's own and stored as their children.

A repair of a failed episode is one. What is stored for an episode is all that follows from it or
nothing, so that a resumed run takes it as it is, or plays it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Awaitable, Callable, Sequence

from ...agents.concurrency import gather
from ...rollouts.episodes.store import Store
from ...rollouts.types import Episode

Derivation = Callable[[Episode], Awaitable[list[Episode]]]


def is_derived(episode: Episode, kind: str) -> bool:
    """Was it derived from another episode as this kind? Its group is named `PARENT/KIND/...`."""
    return episode.parent is not None and episode.group.startswith(f"{episode.parent}/{kind}/")


def stored_children(
    store: Store, episodes: Sequence[Episode], kind: str
) -> dict[str, list[Episode]]:
    """The derived episodes of this kind that are stored, by their parent's id."""
    parents, children = {e.id for e in episodes}, dict[str, list[Episode]]()
    between = re.compile(f"/{re.escape(kind)}/")
    named = {
        id_
        for id_ in store.ids()
        if any(id_[: found.start()] in parents for found in between.finditer(id_))
    }
    for child in store.read(id=named, parent=parents):
        if is_derived(child, kind):
            children.setdefault(str(child.parent), []).append(child)
    return children


async def derive_missing(
    episodes: Sequence[Episode],
    make: Derivation,
    children: dict[str, list[Episode]],
    keep: Callable[[Sequence[Episode]], None],
    concurrency: int,
) -> None:
    """Play what follows from each episode, `concurrency` at once; of those without `children` it is
    stored with `keep` and put there."""
    room = asyncio.Semaphore(concurrency)

    async def one(episode: Episode) -> None:
        async with room:
            derived = [dataclasses.replace(e, parent=episode.id) for e in await make(episode)]
        if episode.id not in children:
            keep(derived)
            children[episode.id] = derived

    await gather([one(episode) for episode in episodes])
