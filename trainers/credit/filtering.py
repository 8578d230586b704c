"""Selection: which turns are learnt from by imitation, with which weight, and why. Pure Python.

A `Rule` judges one turn; `select` applies it to every turn of an agent that learns and then the
bounds that hold for any rule: turns that saw the answer or read one that did, answers that leaked
into a prompt, first or last turn only, doubles, caps per task. What comes out is one weight per
turn and a table, per agent, of what was kept and dropped for which reason.

In an episode with a written turn (a repair), what was said before that turn belongs to the run that
failed and is not kept.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.seeds import derive_seed
from ...agents.settings import help_of
from ...agents.text.answers import normalise, same, vote
from ...agents.types import SettingError, Task, Turn, nearest
from ...rollouts.types import Episode, TurnKey
from .rules import RewardWeights, agent_reward, team_rewards

Rule = Callable[[Episode, Turn], tuple[float, str]]  # weight (0: dropped) and reason


@dataclass
class SelectionConfig(RewardWeights):
    """Which turns are imitated."""

    select: str = help_of(
        "which turns are kept: success, agreement (with the team's output), all, or random",
        "success",
    )
    success_threshold: float = help_of(
        "success: the turn's own reward, else its agent's, else the team's, from which it is kept",
        1.0,
    )
    keep_share: float = help_of(
        "random: share of turns that are kept, whatever they are worth", 0.5
    )
    turns: str = help_of(
        "of an agent's kept turns in an episode: all, the first or the last one", "all"
    )
    deduplicate: bool = help_of("keep a reply to the same chat once", False)
    max_per_task: int = help_of("most kept turns of an agent per task; 0 is no limit", 0)

    def __post_init__(self) -> None:
        RewardWeights.__post_init__(self)
        if self.select not in RULES:
            raise SettingError(
                f"select {self.select!r}: no such rule; {nearest(self.select, RULES)}"
            )
        if self.turns not in ("all", "first", "last"):
            raise SettingError(f"turns: expected all, first or last, got {self.turns!r}")
        if (
            not math.isfinite(self.success_threshold)
            or not 0 < self.keep_share <= 1
            or self.max_per_task < 0
        ):
            raise SettingError(
                "success_threshold: a number, keep_share: above 0 and at most 1, and max_per_task:"
                f" from 0 expected, got {self.success_threshold}, {self.keep_share} and"
                f" {self.max_per_task}"
            )


@dataclass(frozen=True)
class KeptTurn:
    """A turn that is learnt from: its key (episode id, turn index, sibling), whose it is, its
    weight, and why."""

    key: TurnKey
    agent: str
    weight: float
    reason: str


@dataclass
class FilteredTurns:
    """What is learnt from, and counts by (agent, reason) of what is not."""

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

        def told(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "0"

        return "\n".join(
            f"{agent}: kept {told(of['kept'])}; dropped {told(of['dropped'])}"
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
        rule: judges a turn; None takes the one that `config.select` names.
        agents: whose turns count; None is everybody's. Turns of others are not even counted as
            dropped.
        openings: per agent the text that stands at the head of all its chats (prompt,
            demonstrations): an answer found there is no leak.
        seed: of the rule `random`.
    """
    if len({e.id for e in episodes}) < len(episodes):
        raise ValueError("two episodes have the same id; their turns could not be told apart")
    rule = rule or RULES[config.select](episodes, config, seed)
    found = FilteredTurns()
    said: set[tuple[Any, ...]] = set()
    per_task: Counter[tuple[str, str]] = Counter()
    for episode in episodes:
        judged = list(_judged(episode, rule, found.dropped, agents, openings or {}))
        for place, (turn, weight, reason) in enumerate(judged):
            own = [n for n, (other, _, _) in enumerate(judged) if other.agent == turn.agent]
            reply = (turn.agent, turn.prompt_ids or turn.messages, turn.token_ids or turn.text)
            why = ""
            if config.turns != "all" and place != own[0 if config.turns == "first" else -1]:
                why = f"not the {config.turns} of its kept turns"
            elif config.deduplicate and reply in said:
                why = "a double"
            elif (
                config.max_per_task and per_task[turn.agent, episode.task.id] >= config.max_per_task
            ):
                why = f"over {config.max_per_task} per task"
            if why:
                found.dropped[turn.agent, why] += 1
                continue
            said.add(reply)
            per_task[turn.agent, episode.task.id] += 1
            found.kept.append(
                KeptTurn((episode.id, turn.index, turn.sibling), turn.agent, weight, reason)
            )
    return found


def _judged(
    episode: Episode,
    rule: Rule,
    dropped: Counter[tuple[str, str]],
    agents: Collection[str] | None,
    openings: Mapping[str, str],
) -> Iterable[tuple[Turn, float, str]]:
    """The turns of an episode that may be learnt from and that the rule keeps; the others are
    counted."""
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


# rules


def outcome(episode: Episode, turn: Turn, team: float, config: RewardWeights) -> float:
    """What a turn came to: its own rewards, weighted and summed; without any its agent's; without
    these `team`. NaN: not known."""
    own = [
        r
        for r in episode.rewards
        if (r.turn, r.sibling) == (turn.index, turn.sibling) and config.weight(r.name)
    ]
    if episode.error is None and own:
        return sum(config.weight(r.name) * r.value for r in own)
    return agent_reward(episode, turn.agent, team, config)


def success(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """Taken turns whose `outcome` reaches `success_threshold`, weight 1. An unknown outcome is
    none."""
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
    """Taken turns that give the team's own output as their answer (a majority's pseudo-label),
    weight 1. No gold answer is read."""

    def rule(episode: Episode, turn: Turn) -> tuple[float, str]:
        if not turn.taken:
            return 0.0, "not taken"
        if not (episode.output or "").strip():
            return 0.0, "no output to agree with"
        return (1.0, "agrees") if same(vote(turn), episode.output) else (0.0, "answers otherwise")

    return rule


def everything(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """All taken turns, weight 1."""
    return lambda episode, turn: (1.0, "all") if turn.taken else (0.0, "not taken")


def at_random(episodes: Sequence[Episode], config: SelectionConfig, seed: int = 0) -> Rule:
    """Taken turns drawn with probability `keep_share`, whatever they are worth: the control of any
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


RULES: dict[str, Callable[[Sequence[Episode], SelectionConfig, int], Rule]] = {
    "success": success,
    "agreement": agreement,
    "all": everything,
    "random": at_random,
}


# gold


def saw_answer(episode: Episode) -> set[int]:
    """Indices of turns that saw the answer, or read (however indirectly) a turn that did."""
    found: set[int] = set()
    for turn in episode.turns:  # ordered by index, and a turn reads earlier ones only
        if turn.saw_gold or found & set(turn.reads):
            found.add(turn.index)
    return found


def golds(task: Task) -> list[str]:
    """The spellings of a task's answer that a text must not hold."""
    given = task.answer if isinstance(task.answer, (list, tuple)) else [task.answer]
    parts = [
        part
        for gold in given
        for part in (gold if isinstance(gold, (list, tuple)) else [gold])
        if part is not None
    ]
    return list(
        dict.fromkeys(
            form for part in parts for form in (str(part).strip(), normalise(str(part))) if form
        )
    )


def tells(text: str, answers: Iterable[str]) -> bool:
    """Does the text hold one of these answers, as a whole word or number?"""
    return any(
        re.search(rf"(?<![\w.]){re.escape(a)}(?!\w|[.,]\d)", text, re.IGNORECASE) for a in answers
    )


def leaks_answer(episode: Episode, turn: Turn, opening: str = "") -> bool:
    """Does the answer stand in a turn's prompt without having a right to?

    It has one if the task itself shows it (prompt, public meta), the agent's opening does, or an
    untainted earlier turn of the episode says it: an agent may well have found it.
    """
    answers, public = golds(episode.task), episode.task.public()
    if not answers or not tells("\n".join(m.content for m in turn.messages), answers):
        return False
    gold = saw_answer(episode)
    said = [t.text for t in episode.turns if t.index < turn.index and t.index not in gold]
    known = "\n".join([public.prompt, *map(str, public.meta.values()), opening, *said])
    return not tells(known, answers)
