"""Episodes that are stored already: those of a step that a resumed run played before it was cut off, and those of another run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..agents.repair import SPLIT
from ..agents.types import AgentSpec, SettingError, Task
from ..rollouts.play import Job, jobs
from ..rollouts.store import Store
from ..rollouts.tokens import ChatTokens
from ..rollouts.types import Episode, groups
from .records import tasks_of


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


def training(store: Store) -> list[Episode]:
    """The episodes of a store that may be learnt from: evaluations are stored beside them and stay held out, as do repairs, which were
    told the answer."""
    return [e for e in store if e.split not in ("eval", SPLIT) and not e.group.startswith("eval-")]


class Given:
    """The training episodes of a store that another run or `marlora collect` has filled.

    Args:
        folder: the store, or a run that holds one as `episodes`.
        agents: of the team that learns from them; at least one of them has to have spoken there.

    Raises `SettingError` if there is no store, no training episode in it, or none of these agents.
    """

    def __init__(self, folder: str | Path, agents: Sequence[AgentSpec]) -> None:
        path = Path(folder)
        path = path / "episodes" if (path / "episodes").is_dir() else path
        if not path.is_dir():
            raise SettingError(f"episodes {str(folder)!r}: no such folder; expected a run or a store of episodes")
        self.episodes = training(Store(path))
        if not self.episodes:
            raise SettingError(f"episodes {str(folder)!r}: the store holds no training episode")
        spoke, names = {t.agent for e in self.episodes for t in e.turns}, [a.name for a in agents]
        if not spoke & set(names):
            raise SettingError(
                f"episodes {str(folder)!r}: its agents are {', '.join(sorted(spoke))}, this team's are {', '.join(names)}"
            )

    def check_tokens(self, tokens_of: Mapping[str, ChatTokens], count: int = 50) -> None:
        """Raise `SettingError` unless the first turns of every agent read the same in its own tokenizer: ids of another one are other words."""
        for agent, tokens in tokens_of.items():
            spoken = (t for e in self.episodes for t in e.turns if t.agent == agent and t.token_ids)
            for turn in itertools.islice(spoken, count):
                if tokens.decode(turn.token_ids) != turn.text:
                    raise SettingError(
                        f"episodes: a turn of {agent!r} says {turn.text[:40]!r}, but its tokens read {tokens.decode(turn.token_ids)[:40]!r} "
                        "in this run's model; expected episodes that were sampled with the tokenizer that learns from them"
                    )

    def of(self, count: int, seed: int, step: int) -> list[Episode]:
        """The groups of `count` tasks, chosen as a run that plays chooses its tasks."""
        by_task: dict[str, list[Episode]] = {}
        for group in groups(self.episodes).values():
            by_task.setdefault(group[0].task.id, []).extend(group)
        chosen = tasks_of([group[0].task for group in by_task.values()], count, seed, step)
        return [episode for task in chosen for episode in by_task[task.id]]
