"""Credit: the advantage of every turn of a step's episodes, by a published rule. Pure Python.

A rule takes the episodes of a step and their rewards and gives one number per turn; the trainer
multiplies it into the policy gradient of the turn's tokens (for `success` it is a weight of
supervised training). What holds for every rule stands in `weights.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from ...agents.lookup import load_function
from ...agents.types import SettingError
from ...rollouts.types import Episode, TurnKey
from .counterfactual import counterfactual
from .filtering import rejection_sampling
from .group import at_grpo, dr_grpo, dr_mas, grpo, rloo
from .rae import rae
from .returns import agent, team, turn
from .weights import Advantages, CreditConfig, RewardedEpisodes, State, key_of, team_rewards

# the value of `credit` -> its rule; `weights.RULE_NAMES` lists the same names
Rule = Callable[[RewardedEpisodes, CreditConfig], Advantages]
RULES: dict[str, Rule] = {
    "team": team,
    "agent": agent,
    "turn": turn,
    "grpo": grpo,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "at_grpo": at_grpo,
    "dr_mas": dr_mas,
    "rae": rae,
    "success": rejection_sampling,
    "counterfactual": counterfactual,
}

# those that compare a turn with others or with replays; of the other rules an advantage is a return
# or a weight, and a low one says nothing against an agent
COMPARING = ("grpo", "rloo", "dr_grpo", "dr_mas", "at_grpo", "rae", "counterfactual")


def credit(
    episodes: Iterable[Episode],
    config: CreditConfig,
    state: State | None = None,
    in_constant_groups: set[TurnKey] | None = None,
) -> Advantages:
    """Advantages of a step's episodes by the rule `config.credit`: one of `RULES`, or the function
    `(batch, settings) -> Advantages` that `module:function` names.

    `state` is changed in place by rules that remember (`rae`). `in_constant_groups` gets the turns
    of groups all of whose members earned the same: they have rewards and no advantage. Raises
    `SettingError` if no reward of the episodes has a weight, `ValueError` if two episodes have one
    id.
    """
    episodes = list(episodes)
    if len({e.id for e in episodes}) < len(episodes):
        raise ValueError(
            "two episodes of a step have the same id; their turns could not be told apart"
        )
    names = {r.name for e in episodes for r in e.rewards}
    if (
        names
        and config.credit != "counterfactual"
        and not any(config.weight(name) for name in names)
    ):
        raise SettingError(
            f"reward_weights {config.reward_weights}: the rewards given are {sorted(names)}, and"
            " none has a weight"
        )
    rewards = team_rewards(episodes, config)
    batch = RewardedEpisodes(
        episodes,
        rewards,
        {} if state is None else state,
        set() if in_constant_groups is None else in_constant_groups,
    )
    rule: Rule = load_function("credit", config.credit, RULES)
    advantages = rule(batch, config)
    if config.credit not in RULES:
        _check(advantages, episodes, config.credit)
    return advantages


def _check(advantages: Advantages, episodes: Iterable[Episode], name: str) -> None:
    """Raise `SettingError` unless a rule of the user's own gave finite numbers to turns that are
    there."""
    known = {key_of(episode, turn) for episode in episodes for turn in episode.turns}
    for key, value in advantages.items():
        if key not in known or not math.isfinite(value):
            raise SettingError(
                f"credit {name!r}: gave {value!r} to {key}; expected a finite number by (episode"
                " id, turn index, sibling) of a turn of the step's episodes; leave out what is not"
                " to be trained on"
            )


def blame(episodes: Iterable[Episode], advantages: Advantages) -> dict[str, float]:
    """By how much each agent's turns fell short of what a rule compared them with, in episodes that
    went wrong: minus the mean advantage of its turns that have one, at least 0, by agent.

    The mean comes first, so that noise of single advantages is not taken for blame. A rule that
    gives all agents of an episode one advantage (`grpo`) blames them alike.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for each in episode.turns:
            advantage = advantages.get(key_of(episode, each))
            if advantage is not None:
                found[each.agent].append(advantage)
    return {agent: max(0.0, -sum(own) / len(own)) for agent, own in found.items()}
