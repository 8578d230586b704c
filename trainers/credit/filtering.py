"""Turn filtering: which turns are imitated, with which weight, and why. Pure Python.

A `Rule` weighs one turn; `filter_turns` applies it to every turn of an agent that learns and then
the bounds that hold for any rule: turns that saw the answer or read one that did, answers that
leaked into a prompt, first or last turn only, duplicates, caps per task. The result is one weight
per turn and a table, per agent, of the turns kept and dropped by reason.

In an episode with a written turn (a correction) the turns before it belong to the attempt that
failed and are dropped.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.seeds import derive_seed
from ...agents.settings import setting
from ...agents.text.answers import same, vote
from ...agents.types import Turn
from ...rollouts.types import Episode, TurnKey
from .leakage import leaks_answer, saw_answer
from .weights import (
    Advantages,
    CreditConfig,
    RewardedEpisodes,
    RewardWeights,
    agent_reward,
    key_of,
    selected_turns,
    team_rewards,
    turn_rewards,
    weighted_sum,
)

SELECTION_NAMES = ("success", "agreement", "all", "random")

Rule = Callable[[Episode, Turn], tuple[float, str]]  # weight (0: dropped) and reason


@dataclass
class SelectionConfig(RewardWeights):
    """Which turns are imitated."""

    select: str = setting(
        "which turns are kept: success, agreement (with the team's output), all, or random",
        "success",
        choices=SELECTION_NAMES,
    )
    success_threshold: float = setting(
        "success: the turn's own reward, else its agent's, else the team's, from which it is kept",
        1.0,
    )
    keep_share: float = setting(
        "random: share of turns that are kept, whatever their reward", 0.5, above=0, at_most=1
    )
    turns: str = setting(
        "of an agent's kept turns in an episode: all, the first or the last one",
        "all",
        choices=("all", "first", "last"),
    )
    deduplicate: bool = setting("keep a reply to the same chat once", False)
    max_per_task: int = setting(
        "most kept turns of an agent per task; 0 is no limit", 0, at_least=0
    )


@dataclass(frozen=True)
class KeptTurn:
    """A turn that is imitated: its key (episode id, turn index, sibling), its agent, its weight,
    and the reason."""

    key: TurnKey
    agent: str
    weight: float
    reason: str


@dataclass
class FilteredTurns:
    """The turns that are imitated, and counts by (agent, reason) of those that are not."""

    kept: list[KeptTurn] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def weights(self) -> dict[TurnKey, float]:
        """One weight per kept turn: what `samples` takes."""
        return {kept.key: kept.weight for kept in self.kept}

    def table(self) -> dict[str, dict[str, dict[str, int]]]:
        """agent -> {"kept": {reason: turns}, "dropped": {reason: turns}}."""
        kept = Counter((k.agent, k.reason) for k in self.kept)
        agents = dict.fromkeys(agent for agent, _ in [*kept, *self.dropped])
        sides = (("kept", kept), ("dropped", self.dropped))
        return {
            agent: {
                side: {reason: n for (who, reason), n in sorted(counts.items()) if who == agent}
                for side, counts in sides
            }
            for agent in agents
        }

    def __str__(self) -> str:
        """One line per agent, for people."""

        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "0"

        return "\n".join(
            f"{agent}: kept {listed(of['kept'])}; dropped {listed(of['dropped'])}"
            for agent, of in self.table().items()
        )


def filter_turns(
    episodes: Sequence[Episode],
    config: SelectionConfig,
    rule: Rule | None = None,
    *,
    agents: Collection[str] | None = None,
    openings: Mapping[str, str] | None = None,
    seed: int = 0,
) -> FilteredTurns:
    """The turns to learn from, in the order of episodes and turns.

    Args:
        rule: weighs a turn; None takes the one that `config.select` names.
        agents: the agents whose turns are filtered; None is all. Turns of others are not even
            counted as dropped.
        openings: per agent the text at the head of all its chats (prompt, demonstrations): an
            answer in it is no leak.
        seed: of the rule `random`.
    """
    if len({e.id for e in episodes}) < len(episodes):
        raise ValueError("two episodes have the same id; their turns could not be told apart")
    rule = rule or SELECTION_RULES[config.select](episodes, config, seed)
    result = FilteredTurns()
    replies: set[tuple[Any, ...]] = set()
    per_task: Counter[tuple[str, str]] = Counter()
    for episode in episodes:
        weighted = list(_weighted(episode, rule, result.dropped, agents, openings or {}))
        for position, (turn, weight, reason) in enumerate(weighted):
            own = [n for n, (other, _, _) in enumerate(weighted) if other.agent == turn.agent]
            reply = (turn.agent, turn.prompt_ids or turn.messages, turn.token_ids or turn.text)
            why = ""
            if config.turns != "all" and position != own[0 if config.turns == "first" else -1]:
                why = f"not the {config.turns} of its kept turns"
            elif config.deduplicate and reply in replies:
                why = "a double"
            elif (
                config.max_per_task and per_task[turn.agent, episode.task.id] >= config.max_per_task
            ):
                why = f"over {config.max_per_task} per task"
            if why:
                result.dropped[turn.agent, why] += 1
                continue
            replies.add(reply)
            per_task[turn.agent, episode.task.id] += 1
            result.kept.append(
                KeptTurn((episode.id, turn.index, turn.sibling), turn.agent, weight, reason)
            )
    return result


def _weighted(
    episode: Episode,
    rule: Rule,
    dropped: Counter[tuple[str, str]],
    agents: Collection[str] | None,
    openings: Mapping[str, str],
) -> Iterable[tuple[Turn, float, str]]:
    """(turn, weight, reason) of the turns of an episode that the rule keeps; the others are counted
    in `dropped`."""
    gold, repaired = (
        saw_answer(episode),
        min((t.index for t in episode.turns if t.source == "written"), default=-1),
    )
    for turn in episode.turns:
        if agents is not None and turn.agent not in agents:
            continue
        weight = 0.0
        if episode.error is not None:
            reason = "failed episode"
        elif turn.index in gold:
            reason = "saw the answer"
        elif turn.index < repaired:
            reason = "before the repair"
        elif leaks_answer(episode, turn, openings.get(turn.agent, "")):
            reason = "the answer stands in its prompt"
        else:
            weight, reason = rule(episode, turn)
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"episode {episode.id}, turn {turn.index} of {turn.agent!r}: weight {weight};"
                " expected a number from 0"
            )
        if weight:
            yield turn, weight, reason
        else:
            dropped[turn.agent, reason] += 1


def outcome(episode: Episode, turn: Turn, team: float, config: RewardWeights) -> float:
    """The reward of a turn: its own rewards, weighted and summed; without any its agent's; without
    these `team`. NaN if it is unknown."""
    own = turn_rewards(episode, turn, config)
    if episode.error is None and own:
        return weighted_sum(own, config)
    return agent_reward(episode, turn.agent, team, config)


def success(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """Selected turns whose `outcome` reaches `success_threshold`, weight 1. An unknown outcome does
    not reach it."""
    teams = team_rewards(episodes, config)

    def rule(episode: Episode, turn: Turn) -> tuple[float, str]:
        value = outcome(episode, turn, teams[episode.id], config)
        if not turn.taken:
            return 0.0, "not taken"
        if math.isnan(value):
            return 0.0, "no score"
        if value < config.success_threshold:
            return 0.0, "no success"
        return 1.0, "repaired" if turn.source == "written" else "success"

    return rule


def agreement(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """Selected turns that give the team's own output as their answer (a majority's pseudo-label),
    weight 1. No gold answer is read."""

    def rule(episode: Episode, turn: Turn) -> tuple[float, str]:
        if not turn.taken:
            return 0.0, "not taken"
        if not (episode.output or "").strip():
            return 0.0, "no output to agree with"
        return (1.0, "agrees") if same(vote(turn), episode.output) else (0.0, "answers otherwise")

    return rule


def everything(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """All selected turns, weight 1."""
    return lambda episode, turn: (1.0, "all") if turn.taken else (0.0, "not taken")


def at_random(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """Selected turns drawn with probability `keep_share` whatever their reward: the control of any
    other rule."""

    def rule(episode: Episode, turn: Turn) -> tuple[float, str]:
        if not turn.taken:
            return 0.0, "not taken"
        drawn = (
            random.Random(derive_seed(seed, "select", episode.id, turn.index)).random()
            < config.keep_share
        )
        return (1.0, "drawn") if drawn else (0.0, "not drawn")

    return rule


SELECTION_RULES: dict[str, Callable[[Sequence[Episode], SelectionConfig, int], Rule]] = {
    "success": success,
    "agreement": agreement,
    "all": everything,
    "random": at_random,
}


def rejection_sampling(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """The credit rule `success`: weight 1 for every selected turn of an episode whose team reward
    reaches `success_threshold`, all others dropped. Turns written by a teacher are trained too."""
    correct = [
        e for e in batch.episodes if batch.rewards[e.id] >= settings.success_threshold
    ]  # NaN does not reach it
    return {
        key_of(e, turn): 1.0 for e in correct for turn in selected_turns(e) if not turn.saw_gold
    }
