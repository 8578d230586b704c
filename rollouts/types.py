"""The data of rollouts: episodes, the usage of agents, and groups of episodes of one task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..agents.state import TeamState
from ..agents.transcript import Operation
from ..agents.types import Decision, Reward, Task, Turn, Usage

Kind = Literal["train", "trial", "aside", "eval"]


@dataclass(frozen=True)
class Episode:
    """One run of a team on one task, with its rewards.

    Args:
        id: unique in the store.
        group: shared by episodes that are compared with one another (one task, one step).
        kind: `train`; `trial` (scores a candidate) and `aside` (an optimizer's own talk), which are
            never learnt from; `eval`, of held-out tasks.
        parent: id of the episode that played this one as a child.
        follows: id of the episode that an aside is about, "" for none.
        split: of the task: train, eval, ...
        seed: everything sampled follows from it.
        state: what the team played with: adapter versions of the system's policies, and values.
        turns, decisions, operations: all of them, siblings included, ordered by index.
        output: what the system returned; None if it failed.
        output_from: indices of the turns and operations that the output was made of.
        rewards: of all reward functions.
        usage: per agent.
        stop_reason: `done`, `error`, `context` (a prompt did not fit), `limit`, `timeout`.
        error: the failure in one line; such an episode is stored and never trained on. Under
            `on_error: zero` an episode whose system raised has none: its `stop_reason` is `error`,
            its rewards are 0 and say why.
    """

    id: str
    group: str
    task: Task
    seed: int = 0
    kind: Kind = "train"
    parent: str | None = None
    follows: str = ""
    split: str = ""
    step: int = 0
    state: TeamState = TeamState()
    turns: tuple[Turn, ...] = ()
    decisions: tuple[Decision, ...] = ()
    operations: tuple[Operation, ...] = ()
    output: str | None = None
    output_from: tuple[int, ...] = ()
    rewards: tuple[Reward, ...] = ()
    usage: Mapping[str, Usage] = field(default_factory=dict)
    stop_reason: str = "done"
    error: str | None = None

    @property
    def failed(self) -> bool:
        """It did not come to its end as the system meant it, whether or not it counts 0."""
        return self.error is not None or self.stop_reason == "error"

    def trajectory(self, agent: str) -> tuple[Turn, ...]:
        """The turns one agent took, in order, without untaken siblings."""
        return tuple(turn for turn in self.turns if turn.agent == agent and turn.taken)

    def reward(self, name: str | None = None, agent: str | None = None) -> float:
        """Sum of the rewards of this name (None: all) for this agent (None: the team's); NaN if
        there is none or one is NaN."""
        values = [
            r.value
            for r in self.rewards
            if r.agent == agent and r.turn is None and r.decision is None and name in (None, r.name)
        ]
        return sum(values) if values else math.nan


Group = list[Episode]


def groups(episodes: Iterable[Episode]) -> dict[str, Group]:
    """Episodes by group, both in order of first appearance."""
    by_group: dict[str, Group] = {}
    for episode in episodes:
        by_group.setdefault(episode.group, []).append(episode)
    return by_group


TurnKey = tuple[str, int, int]  # episode id, turn index, sibling
DecisionKey = tuple[str, int]  # episode id, decision index
