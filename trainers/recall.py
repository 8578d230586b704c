"""What a resumed run finds in its store: the episodes of a step that were played before it was cut off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from ..agents.types import Task
from ..rollouts.play import Job, jobs
from ..rollouts.store import Store
from ..rollouts.types import Episode


def unscorable(episode: Episode) -> bool:
    """It failed, or a reward of it is NaN."""
    return episode.error is not None or any(math.isnan(r.value) for r in episode.rewards)


def recall(
    store: Store, tasks: Sequence[Task], label: str, num_generations: int, step: int, version: Mapping[str, str]
) -> tuple[list[Job], dict[str, Episode]]:
    """The episodes to play under this label, and those of them that are stored already, with their children, by id.

    Stored episodes count if this team version played them and some could be scored. Others have spent their ids (a run that
    was resumed on hardware that does not repeat itself to the last bit, or after its rewards were mended): then the label
    gets a number, so that what is trained on is always in the store.
    """
    known = store.ids()
    for attempt in itertools.count():
        plan = jobs(tasks, label=f"{label}.{attempt}" if attempt else label, num_generations=num_generations, step=step)
        spent = known & {job.id for job in plan}
        if not spent:
            return plan, {}
        found = {episode.id: episode for episode in store.read(id=spent)}
        if all(e.team_version == version for e in found.values()) and not all(map(unscorable, found.values())):
            return plan, found | _children(store, spent)
    raise AssertionError("count() does not end")


def _children(store: Store, parents: Collection[str]) -> dict[str, Episode]:
    """All that the episodes of these ids played as children, and these in turn."""
    found = {episode.id: episode for episode in store.read(parent=parents)}
    return found | _children(store, found.keys()) if found else {}
