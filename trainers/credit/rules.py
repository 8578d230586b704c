"""Credit: the advantage of every turn of a step's episodes, by a published rule. Pure Python.

A rule takes the episodes of a step and their rewards and gives one number per turn; the trainer
multiplies it into the policy gradient of the turn's tokens (for `success` it is a weight of
supervised training). What holds for every rule stands in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...agents.types import SettingError
from ...rollouts.types import Episode, TurnKey
from .counterfactual import counterfactual
from .filtering import rejection_sampling
from .group import at_grpo, dr_grpo, dr_mas, grpo, rloo
from .rae import rae
from .returns import agent, team, turn
from .weights import Advantages, CreditConfig, RewardedEpisodes, State, team_rewards

# the value of `credit` -> its rule; `weights.RULE_NAMES` lists the same names
RULES: dict[str, Callable[[RewardedEpisodes, CreditConfig], Advantages]] = {
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


def credit(
    episodes: Iterable[Episode],
    config: CreditConfig,
    state: State | None = None,
    without_signal: set[TurnKey] | None = None,
) -> Advantages:
    """Advantages of a step's episodes by the rule `config.credit`.

    `state` is changed in place by rules that remember (`rae`). To `without_signal` are added the
    turns of groups all of whose members earned the same: they have rewards and no advantage. Raises
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
        set() if without_signal is None else without_signal,
    )
    return RULES[config.credit](batch, config)
