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
        found = _families(spent, {episode.id: episode for episode in store.read(step=step)})
        parents = [found[name] for name in spent if name in found]
        if len(parents) == len(spent) and all(e.team_version == version for e in parents) and not all(map(unscorable, parents)):
            return plan, found
    raise AssertionError("count() does not end")


def _families(roots: Collection[str], stored: Mapping[str, Episode]) -> dict[str, Episode]:
    """The episodes of these ids and all that they played as children."""

    def root(episode: Episode) -> str:
        while episode.parent is not None and episode.parent in stored:
            episode = stored[episode.parent]
        return episode.id

    return {name: episode for name, episode in stored.items() if root(episode) in roots}
