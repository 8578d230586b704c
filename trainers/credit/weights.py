"""Rewards of episodes, weighted: the settings that name what counts, and what every credit rule
reads.

Pure Python. For every rule: an episode that failed, or whose rewards hold NaN or infinity, is in no
statistic and is not trained; of the answers sampled for one call only the selected one is trained,
unless the rule says otherwise; an agent without a turn has no sample, rather than a reward of 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...agents.lookup import object_named
from ...agents.settings import Bounds, Settings, check_bounds, setting
from ...agents.types import Reward, SettingError, Turn, nearest
from ...rollouts.types import Episode, TurnKey, groups

# (episode id, turn index, sibling) -> advantage; a turn that is missing is not trained
Advantages = dict[TurnKey, float]
State = dict[str, float]  # what a rule remembers between steps; a checkpoint keeps it
# rewards that count only if `reward_weights` names them
UNWEIGHTED = ("format", "length", "counterfactual", "valid", "ran", "rating")
RULE_NAMES = (
    *("team", "agent", "turn", "grpo", "rloo", "dr_grpo", "at_grpo", "dr_mas"),
    *("rae", "success", "counterfactual"),
)


@dataclass
class RewardWeights(Settings):
    """Which of an episode's rewards count for learning, and how much."""

    reward_weights: dict | str | None = setting(
        "weight by reward name; empty: every reward counts 1, but for `format`, `length`, `valid`"
        " and `ran`",
        factory=dict,
    )

    def prepare(self) -> None:
        if isinstance(self.reward_weights, str):
            try:
                self.reward_weights = json.loads(self.reward_weights)
            except ValueError as error:
                raise SettingError(
                    f"reward_weights: expected a mapping, got {self.reward_weights!r}"
                ) from error
        self.reward_weights = {} if self.reward_weights is None else self.reward_weights
        weights = self.reward_weights
        if not isinstance(weights, Mapping) or not all(
            isinstance(w, (int, float)) and math.isfinite(w) for w in weights.values()
        ):
            raise SettingError(f"reward_weights: expected a number by reward name, got {weights!r}")

    def weight(self, name: str) -> float:
        """The factor of a reward of this name."""
        if self.reward_weights:
            return float(self.reward_weights.get(name, 0.0))  # type: ignore[union-attr]
        return 0.0 if name in UNWEIGHTED else 1.0

    def check_names(self, known: Collection[str], where: str = "") -> None:
        """Raise `SettingError` if a weight is of a reward that is not among the known names.
        `where`: what they are the rewards of."""
        for name in self.reward_weights or ():
            if name not in known:
                raise SettingError(
                    f"reward_weights.{name}: no reward of this name{where};"
                    f" {nearest(str(name), sorted(known))}"
                )


@dataclass
class CreditConfig(RewardWeights):
    """How rewards become advantages. `credit` names the rule (`rules.RULES`); each other field says
    which rules read it."""

    credit: str = setting(
        "rule: grpo, rloo, dr_grpo, dr_mas, at_grpo, rae, team, agent, turn, counterfactual,"
        " success (keep correct episodes), or module:function of your own",
        "grpo",
    )
    scale_rewards: str = setting(
        "grpo, dr_mas, at_grpo: divide by the standard deviation of the group, the batch, or none",
        "group",
        choices=("group", "batch", "none"),
    )
    advantage_epsilon: float = setting("added to that standard deviation", 1e-4, at_least=0)
    discount: float = setting(
        "team, turn, rae: factor per turn between a turn and what it earned",
        1.0,
        at_least=0,
        at_most=1,
    )
    turn_clock: str = setting(
        "turn: discount over all turns (global), or over the agent's own only, earning only its own"
        " (own)",
        "global",
        choices=("global", "own"),
    )
    team_weight: float = setting(
        "at_grpo: weight of the team's reward against the agent's own (alpha)", 1.0
    )
    rae_decay: float = setting(
        "rae: decay of the running mean per task source and agent", 0.95, at_least=0, at_most=1
    )
    success_threshold: float = setting("success: team reward from which an episode is correct", 1.0)
    counterfactual_baseline: str = setting(
        "counterfactual: a turn is compared with replays in which it says nothing (default), with"
        " the other answers sampled for its call (siblings), or the value after it with the value"
        " before it (value)",
        "default",
        choices=("default", "siblings", "value"),
    )
    num_replays: int = setting(
        "counterfactual: plays of an episode for each alternative", 1, at_least=1
    )

    def check(self) -> None:
        if ":" in self.credit:
            object_named("credit", self.credit)
        else:
            check_bounds("credit", str, Bounds(RULE_NAMES), self.credit)


@dataclass(frozen=True)
class RewardedEpisodes:
    """The episodes of a step as a credit rule reads them.

    Args:
        rewards: the team's reward by episode id, NaN where it is unknown (`team_rewards`).
        state: of rules that remember between steps; changed in place.
        in_constant_groups: turns of groups whose episodes all earned the same, which a rule that
            compares adds here.
    """

    episodes: Sequence[Episode]
    rewards: Mapping[str, float]
    state: State = field(default_factory=dict)
    in_constant_groups: set[TurnKey] = field(default_factory=set)

    @property
    def known_rewards(self) -> list[float]:
        """The team's rewards that are numbers."""
        return [reward for reward in self.rewards.values() if not math.isnan(reward)]

    def reward_of(self, episode: Episode, agent: str, weights: RewardWeights) -> float:
        """`agent_reward` of an agent in one of these episodes."""
        return agent_reward(episode, agent, self.rewards[episode.id], weights)


def team_rewards(episodes: Sequence[Episode], weights: RewardWeights) -> dict[str, float]:
    """Weighted sum of the team's rewards by episode id.

    NaN if the episode failed, if a reward is not finite, if it has none, or if it lacks one that
    others of its group have.
    """
    totals: dict[str, float] = {}
    for group in groups(episodes).values():
        of_team = {
            e.id: [
                r
                for r in e.rewards
                if r.agent is None and about_whole(r) and weights.weight(r.name)
            ]
            for e in group
        }
        expected = {
            r.name
            for e in group
            if e.error is None
            for r in of_team[e.id]
            if math.isfinite(r.value)
        }
        for e in group:
            complete = (
                e.error is None and of_team[e.id] and expected <= {r.name for r in of_team[e.id]}
            )
            totals[e.id] = weighted_sum(of_team[e.id], weights) if complete else math.nan
    return totals


def agent_reward(episode: Episode, agent: str, team: float, weights: RewardWeights) -> float:
    """The agent's own rewards, weighted and summed; the team's reward where it has none."""
    own = [
        r for r in episode.rewards if r.agent == agent and about_whole(r) and weights.weight(r.name)
    ]
    return math.nan if episode.error is not None else weighted_sum(own, weights) if own else team


def about_whole(reward: Reward) -> bool:
    """Whether a reward is of the whole episode, rather than of one turn or decision."""
    return reward.turn is None and reward.decision is None


def turn_rewards(episode: Episode, turn: Turn, weights: RewardWeights) -> list[Reward]:
    """The rewards of this turn and sibling that have a weight."""
    return [
        r
        for r in episode.rewards
        if (r.turn, r.sibling) == (turn.index, turn.sibling) and weights.weight(r.name)
    ]


def weighted_sum(rewards: Iterable[Reward], weights: RewardWeights) -> float:
    """Sum of weight x value; NaN if it is infinite, which no other number can be compared with."""
    total = sum(weights.weight(r.name) * r.value for r in rewards)
    return total if math.isfinite(total) else math.nan


def key_of(episode: Episode, turn: Turn) -> TurnKey:
    """(episode id, turn index, sibling)."""
    return (episode.id, turn.index, turn.sibling)


def selected_turns(episode: Episode) -> list[Turn]:
    """The turns of the episode proper: of several answers to one call, the one that was used."""
    return [turn for turn in episode.turns if turn.taken]


def trainable(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Turns that a policy sampled itself, without having seen the answer."""
    return (turn for turn in turns if turn.source == "sampled" and not turn.saw_gold)


def trainable_keys(episode: Episode, turns: Iterable[Turn]) -> list[TurnKey]:
    """Keys of those of the turns that are `trainable`."""
    return [key_of(episode, turn) for turn in trainable(turns)]
