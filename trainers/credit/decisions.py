"""Credit for decisions: the weight of every choice that is not tokens, by the rules for turns. Pure
Python.

Each decision stands in for a turn of an agent of the decision's name, and the rule `config.credit`
is applied as it is. The loss is -A log p(choice) on the part that chose (`values.logit_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...agents.types import SettingError, Turn
from ...rollouts.types import DecisionKey, Episode, TurnKey
from .rules import credit
from .weights import CreditConfig, State


def decision_credit(
    episodes: Sequence[Episode],
    config: CreditConfig,
    state: State | None = None,
    *,
    across_tasks: bool = False,
) -> dict[DecisionKey, float]:
    """Weight A of each decision, by (episode id, decision index).

    A decision that is missing is not learnt from: its episode failed, or has no reward that is a
    number. One whose group says nothing (all earned the same) has weight 0, so that a loss that is
    a mean over episodes counts it.

    Args:
        config: `credit` names the rule. The team's rewards count, rewards about a decision
            (`Reward.decision`) as those about a turn do, and those of an agent where the decision
            has that agent's name.
        state: of rules that remember (`rae`); keep it apart from the turns'.
        across_tasks: compare all episodes with one another rather than those of one task: with
            `credit: dr_grpo` the baseline is the batch's mean reward, as REINFORCE has it.

    Raises `ValueError` for an episode that is not of the kind `train`, `SettingError` for the rule
    `at_grpo`, which compares several answers to one call: a decision has one choice.
    """
    for episode in episodes:
        if episode.kind != "train":
            raise ValueError(
                f"episode {episode.id}: its kind is {episode.kind!r}; only episodes of the kind"
                " 'train' are learnt from"
            )
    if config.credit == "at_grpo":
        raise SettingError(
            "credit: at_grpo compares several answers to one call, and a decision has one choice;"
            " use grpo, dr_grpo, rloo or another rule"
        )
    stand_ins = [_stand_in(episode, across_tasks) for episode in episodes]
    silent: set[TurnKey] = set()
    found = credit(stand_ins, config, state, silent)
    weights = {**dict.fromkeys(silent, 0.0), **found}
    return {
        (episode.id, decision.index): weights[episode.id, decision.index, 0]
        for episode in episodes
        for decision in episode.decisions
        if (episode.id, decision.index, 0) in weights
    }


def _stand_in(episode: Episode, across_tasks: bool) -> Episode:
    """The episode with a turn per decision instead of its turns, and the rewards that are about
    them."""
    return replace(
        episode,
        group="" if across_tasks else episode.group,
        turns=tuple(Turn(decision.index, decision.name) for decision in episode.decisions),
        rewards=tuple(
            reward if reward.decision is None else replace(reward, turn=reward.decision)
            for reward in episode.rewards
            if reward.turn is None
        ),
    )
