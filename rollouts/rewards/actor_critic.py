"""Reward of each turn of an actor-critic team (`marlora.agents.patterns.actor_critic`); in a YAML
file `rewards: [correct, marlora.rollouts.rewards.actor_critic:roles]`.

With it a selection by success keeps an actor's right answers, a judge's right judgements, and a
critic's feedback that a right answer followed (SiriuS, arXiv 2502.04780), whatever came of the
episode.
"""

from __future__ import annotations

import dataclasses

from ...agents.lookup import trusted
from ...agents.patterns.actor_critic import verdict
from ...agents.types import Reward, Task
from ..types import Episode
from .builtin import correct


@trusted("reward")
async def roles(task: Task, episode: Episode) -> list[Reward]:
    """A reward named `role` for each taken turn, 1 or 0; its text is the judge's `label`.

    The agent of the first turn is the actor, the second agent the judge, any other the critic.
    """
    turns = [turn for turn in episode.turns if turn.taken]
    actor, judge, *_ = [*dict.fromkeys(turn.agent for turn in turns), "", ""]
    right = {
        turn.index: (
            (await correct(task, dataclasses.replace(episode, output=turn.text))).value == 1.0
        )
        for turn in turns
        if turn.agent == actor
    }
    rewards = []
    for turn in turns:
        text = ""
        if turn.agent == actor:
            good = right[turn.index]
        elif turn.agent == judge:
            answer, judged = right[max(i for i in right if i < turn.index)], verdict(turn.text)
            good, text = judged is answer, label(answer, judged)
        else:
            good = next((right[index] for index in sorted(right) if index > turn.index), False)
        rewards.append(
            Reward("role", float(good), text, turn.agent, turn.index, turn.sibling, source="roles")
        )
    return rewards


def label(right: bool, judged: bool | None) -> str:
    """The judge's verdict in the paper's confusion table: PT and NT are correct, PF calls a right
    answer wrong, NF a wrong one right."""
    if judged is None:
        return "no verdict"
    return ("P" if right else "N") + ("T" if judged is right else "F")
