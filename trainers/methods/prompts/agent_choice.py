"""Whose prompt to rewrite next: asked of a credit rule, or drawn at random as the control.

The rules that turn rewards into advantages of turns also say which agents' turns fell short
(`credit/rules.py:blame`), so one rule serves weights and prompts. `counterfactual` by the baseline
`value` replays episodes that went wrong from before each turn, and blames the agents whose turns
made the team's expected reward fall. Others do this for prompts alone: CANTANTE (arXiv:2605.13295)
with contrasted rollouts, MASPO (arXiv:2605.06623) with a judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....agents.concurrency import gather
from ....agents.settings import Settings, setting
from ....agents.state import Param
from ....rollouts.types import Episode
from ...collection.rollout_manager import RolloutManager
from ...credit.counterfactual import counterfactual_rewards
from ...credit.rules import COMPARING, blame, credit
from ...credit.weights import CreditConfig, RewardWeights, team_rewards

UNIFORM = "uniform"


@dataclass
class AgentChoiceConfig(Settings):
    """How the agent is chosen whose prompt is rewritten."""

    prompt_credit: str = setting(
        "whose prompt is rewritten: uniform (drawn at random), or in proportion to how far agents'"
        " turns fell short in episodes that went wrong, by a credit rule: counterfactual (those are"
        " replayed from before each turn), at_grpo, rae, grpo, rloo, dr_grpo or dr_mas",
        UNIFORM,
        choices=(UNIFORM, *COMPARING),
    )
    blamed_episodes: int = setting(
        "prompt_credit: episodes of lowest reward that are looked at", 8, at_least=1
    )
    prompt_replays: int = setting(
        "prompt_credit counterfactual: plays from before each turn", 2, at_least=1
    )


@dataclass(frozen=True)
class Choice:
    """The agents chosen, an agent as often as it is to be rewritten, and the blame of each agent
    that the rule could judge (empty for `uniform`)."""

    agents: Sequence[str]
    blame: Mapping[str, float]


class AgentChoice:
    """Chooses agents by the setting `prompt_credit`. Every rank has to call it.

    Args:
        rollouts: replay.
        weights: which rewards count.
    """

    def __init__(
        self, rollouts: RolloutManager, config: AgentChoiceConfig, weights: RewardWeights
    ) -> None:
        self.rollouts, self.config = rollouts, config
        self.credit = CreditConfig(
            reward_weights=weights.reward_weights,
            credit="grpo" if config.prompt_credit == UNIFORM else config.prompt_credit,
            counterfactual_baseline="value",
            num_replays=config.prompt_replays,
        )

    def choose(
        self, params: Sequence[Param], count: int, episodes: Sequence[Episode], rng: random.Random
    ) -> Choice:
        """`count` of the agents of these prompts, drawn in proportion to their blame; all alike
        where nobody is to blame.

        Args:
            episodes: played with these prompts.
        """
        found = {} if self.config.prompt_credit == UNIFORM else self.blame(episodes)
        agents = [param.agent for param in params]
        shares = [found.get(agent, 0.0) for agent in agents]
        drawn = rng.choices(agents, shares if sum(shares) > 0 else None, k=count)
        return Choice(drawn, {agent: found[agent] for agent in agents if agent in found})

    def blame(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """By how much each agent's turns fell short in those of lowest reward."""
        wrong = self._worst(episodes)
        if self.config.prompt_credit == "counterfactual":
            wrong = episodes = self._replayed(wrong)
        return blame(wrong, credit(episodes, self.credit, {}))

    def _worst(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Those of lowest reward, of equal ones the earlier, without those that have none."""
        rewards = team_rewards(episodes, self.credit)
        scored = [e for e in episodes if not math.isnan(rewards[e.id])]
        ranked = sorted(scored, key=lambda episode: rewards[episode.id])
        return ranked[: self.config.blamed_episodes]

    def _replayed(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes with counterfactual rewards."""
        rollouts = self.rollouts

        async def replay(episode: Episode) -> Episode:
            player = dataclasses.replace(rollouts.player(episode.state), recorded=False)
            return await counterfactual_rewards(player, episode, self.credit)

        def work() -> list[Episode]:
            with contextlib.ExitStack() as held:
                for episode in episodes:
                    held.enter_context(rollouts.sync.hold(episode.state.versions))
                return rollouts.run_rollouts(gather([replay(episode) for episode in episodes]))

        return rollouts.ranks.share(work, Episode)
