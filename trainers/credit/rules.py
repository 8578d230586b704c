"""Credit: which turn of which episode is pushed up or down, and how far. Pure Python, one function
per published rule.

A rule takes the episodes of a step and gives one number per turn; the trainer multiplies it into
the policy gradient of the turn's tokens (for `success` it is a weight of supervised training).
Groups are the episodes that share `Episode.group`.

For every rule: an episode that failed, or whose rewards hold NaN, is in no statistic and is not
trained; a turn that saw the answer or was written by someone else is not trained (but `success`
takes written ones); of siblings only the taken one is trained (but `at_grpo` and `counterfactual`
train all); a group without signal (one member, or all equal) is left out; an agent that did not
speak has no sample, rather than a reward of 0.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...agents.settings import help_of
from ...agents.types import Reward, SettingError, Turn, nearest
from ...rollouts.types import Episode, TurnKey, groups

Advantages = dict[
    TurnKey, float
]  # (episode id, turn index, sibling) -> advantage; a turn that is missing is not trained
State = dict[str, float]  # what a rule remembers between steps; a checkpoint keeps it
ASIDE = (
    "format",
    "counterfactual",
    "valid",
    "ran",
)  # rewards that count only if `reward_weights` names them


@dataclass
class RewardWeights:
    """Which of an episode's rewards count for learning, and how much."""

    reward_weights: dict | str | None = help_of(
        "weight by reward name; empty: every reward counts 1, but for `format`, `valid` and `ran`",
        factory=dict,
    )

    def __post_init__(self) -> None:
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
        """What a reward of this name counts."""
        if self.reward_weights:
            return float(self.reward_weights.get(name, 0.0))  # type: ignore[union-attr]
        return 0.0 if name in ASIDE else 1.0


@dataclass
class CreditConfig(RewardWeights):
    """How rewards become advantages. `credit` names the rule (`RULES`); each other field says which
    rules read it."""

    credit: str = help_of(
        "rule: grpo, rloo, dr_grpo, dr_mas, at_grpo, rae, team, agent, turn, counterfactual, or"
        " success (keep correct episodes)",
        "grpo",
    )
    scale_rewards: str = help_of(
        "grpo, dr_mas, at_grpo: divide by the standard deviation of the group, the batch, or none",
        "group",
    )
    advantage_epsilon: float = help_of("added to that standard deviation", 1e-4)
    discount: float = help_of(
        "team, turn, rae: factor per turn between a turn and what it earned", 1.0
    )
    turn_clock: str = help_of(
        "turn: discount over all turns (global), or over the agent's own only, earning only its own"
        " (own)",
        "global",
    )
    team_weight: float = help_of(
        "at_grpo: weight of the team's reward against the agent's own (alpha)", 1.0
    )
    rae_decay: float = help_of("rae: decay of the running mean per task source and agent", 0.95)
    success_threshold: float = help_of("success: team reward from which an episode is correct", 1.0)

    def __post_init__(self) -> None:
        RewardWeights.__post_init__(self)
        if self.credit not in RULES:
            raise SettingError(
                f"credit {self.credit!r}: no such rule; {nearest(self.credit, RULES)}"
            )
        for name, allowed in (
            ("scale_rewards", ("group", "batch", "none")),
            ("turn_clock", ("global", "own")),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, low, high in (
            ("discount", 0, 1),
            ("rae_decay", 0, 1),
            ("advantage_epsilon", 0, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise SettingError(
                    f"{name}: expected a number from {low} to {high}, got {getattr(self, name)}"
                )


def credit(
    episodes: Iterable[Episode], config: CreditConfig, state: State | None = None
) -> Advantages:
    """Advantages of a step's episodes by `config.credit`. `state` is changed in place by rules that
    remember (`rae`).

    Raises `SettingError` if no reward that was given has a weight, `ValueError` if two episodes
    have one id.
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
    return RULES[config.credit](episodes, config, {} if state is None else state)


def has_signal(advantages: Mapping[TurnKey, float]) -> bool:
    """Would these advantages move anything?"""
    return any(advantages.values())


# rewards of an episode


def team_rewards(episodes: Sequence[Episode], config: RewardWeights) -> dict[str, float]:
    """Weighted sum of the team's rewards by episode id.

    NaN if the episode failed, if a reward is NaN, if it has none, or if it lacks one that others of
    its group have.
    """
    found: dict[str, float] = {}
    for group in groups(episodes).values():
        given = {
            e.id: [
                r for r in e.rewards if r.agent is None and r.turn is None and config.weight(r.name)
            ]
            for e in group
        }
        expected = {
            r.name for e in group if e.error is None for r in given[e.id] if not math.isnan(r.value)
        }
        for e in group:
            whole = e.error is None and given[e.id] and expected <= {r.name for r in given[e.id]}
            found[e.id] = _total(given[e.id], config) if whole else math.nan
    return found


def agent_reward(episode: Episode, agent: str, team: float, config: RewardWeights) -> float:
    """The agent's own rewards, weighted and summed; the team's reward where it has none."""
    own = [
        r for r in episode.rewards if r.agent == agent and r.turn is None and config.weight(r.name)
    ]
    return math.nan if episode.error is not None else _total(own, config) if own else team


def _total(rewards: Iterable[Reward], config: RewardWeights) -> float:
    return sum(config.weight(r.name) * r.value for r in rewards)


def _key(episode: Episode, turn: Turn) -> TurnKey:
    return (episode.id, turn.index, turn.sibling)


def _taken(episode: Episode) -> list[Turn]:
    return [turn for turn in episode.turns if turn.taken]


def _trained(turns: Iterable[Turn]) -> Iterator[Turn]:
    return (turn for turn in turns if turn.source == "sampled" and not turn.saw_gold)


def _spread(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 below, as in TRL and verl."""
    mean = math.fsum(values) / len(values)
    return (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else 0.0
    )


def _flat(values: Sequence[float]) -> bool:
    """One value, or all the same: no signal. Asked before the mean is subtracted, so that rounding
    cannot make one."""
    return len(values) < 2 or max(values) == min(values)


def _centred(values: Sequence[float], config: CreditConfig, batch_std: float = 0.0) -> list[float]:
    """(value - mean) / (std + epsilon), or value - mean with `scale_rewards: none`."""
    mean = math.fsum(values) / len(values)
    if config.scale_rewards == "none":
        return [v - mean for v in values]
    std = batch_std if config.scale_rewards == "batch" else _spread(values)
    return [(v - mean) / (std + config.advantage_epsilon) for v in values]


# rules


def team(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """The team's reward to every turn, A_t = discount^(T - 1 - t) R, with t counting taken turns.
    No baseline."""
    rewards, found = team_rewards(episodes, config), Advantages()
    for e in episodes:
        turns = _taken(e)
        place = {_key(e, turn): t for t, turn in enumerate(turns)}
        if not math.isnan(rewards[e.id]):
            found |= {
                key: config.discount ** (len(turns) - 1 - place[key]) * rewards[e.id]
                for key in _keys(e, turns)
            }
    return found


def agent(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """Each agent's own reward to all its turns; the team's where it has none. No baseline."""
    rewards = team_rewards(episodes, config)
    own = {
        _key(e, t): agent_reward(e, t.agent, rewards[e.id], config)
        for e in episodes
        for t in _trained(_taken(e))
    }
    return {key: value for key, value in own.items() if not math.isnan(value)}


def turn(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """Returns from rewards of turns, the team's reward R added to the last turn.

    Global clock: Ret_t = r_t + [t is last] R + discount Ret_{t+1}: a turn earns what later turns of
    others earn. Own clock: the same over the agent's own turns only, R added to each agent's last.
    """
    teams, found = team_rewards(episodes, config), Advantages()
    for e in episodes:
        scored = [r for r in e.rewards if r.turn is not None and config.weight(r.name)]
        has_team = any(
            r.agent is None and r.turn is None and config.weight(r.name) for r in e.rewards
        )
        last = teams[e.id] if has_team else 0.0
        if (
            e.error is not None
            or math.isnan(last)
            or any(math.isnan(r.value) for r in scored)
            or not (scored or has_team)
        ):
            continue
        clocks: dict[str, list[Turn]] = defaultdict(list)
        for each in _taken(e):
            clocks["" if config.turn_clock == "global" else each.agent].append(each)
        for turns in clocks.values():
            ahead = last
            for each in reversed(turns):
                own = _total(
                    (r for r in scored if (r.turn, r.sibling) == (each.index, each.sibling)), config
                )
                # the first time round, `ahead` is R itself, which is not discounted
                ahead = own + (ahead if each is turns[-1] else config.discount * ahead)
                found |= {key: ahead for key in _keys(e, [each])}
    return found


def grpo(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """Group-relative (GRPO, arXiv:2402.03300): A = (R - mean) / (std + epsilon) over the group;
    TRL's std (n - 1) and epsilon."""
    rewards = team_rewards(episodes, config)
    std = _spread([r for r in rewards.values() if not math.isnan(r)] or [0.0])
    return _per_group(episodes, rewards, lambda values: _centred(values, config, std))


def dr_grpo(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """A = R - mean of the group, not divided by its spread (Dr. GRPO, arXiv:2503.20783)."""
    return _per_group(
        episodes,
        team_rewards(episodes, config),
        lambda values: [v - math.fsum(values) / len(values) for v in values],
    )


def rloo(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """A = R - mean of the others of the group (RLOO, arXiv:2402.14740)."""
    return _per_group(episodes, team_rewards(episodes, config), leave_one_out)


def dr_mas(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """GRPO with each agent's own statistics (Dr. MAS, arXiv:2602.08847): over all its turns in the
    group.

    Rewards of different scale, or agents that speak more often, then do not set the step size of
    the others. An agent's reward is its own, else the team's. Rows are turns: an episode in which
    it speaks twice counts twice, as in the authors' code.
    """
    rewards = team_rewards(episodes, config)
    rows: dict[tuple[str, str], dict[TurnKey, float]] = defaultdict(dict)
    for e in episodes:
        for each in _trained(_taken(e)):
            value = agent_reward(e, each.agent, rewards[e.id], config)
            if not math.isnan(value):
                rows[e.group, each.agent][_key(e, each)] = value
    return _rows(rows, config)


def at_grpo(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """GRPO among the siblings of one call (AT-GRPO, arXiv:2510.11062): r = team_weight r_team +
    r_own, all K siblings are trained.

    Both come from rewards of the turn and sibling: `agent` None is the team's, else the agent's
    own.
    """
    rows: dict[tuple[str, int], dict[TurnKey, float]] = defaultdict(dict)
    for e in episodes:
        for each in _trained(e.turns) if e.error is None else ():
            given = [
                r
                for r in e.rewards
                if (r.turn, r.sibling) == (each.index, each.sibling) and config.weight(r.name)
            ]
            value = sum(
                config.weight(r.name) * r.value * (config.team_weight if r.agent is None else 1.0)
                for r in given
            )
            if given and not math.isnan(value):
                rows[e.id, each.index][_key(e, each)] = value
    return _rows(rows, config)


def rae(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """Role-conditioned advantage for self-play (SPIRAL, arXiv:2506.24119): A = R_agent - b, then b
    <- decay b + (1 - decay) R_agent.

    b is kept per task source and agent in `state`, starts at 0, and is updated after use, episode
    by episode in order of their ids, so G = 1 works and the order of arrival does not matter. Of an
    agent's turns the k-th from the end gets A discount^k.
    """
    rewards, found = team_rewards(episodes, config), Advantages()
    for e in sorted(episodes, key=lambda e: e.id):
        for name in dict.fromkeys(each.agent for each in _taken(e)):
            value = agent_reward(e, name, rewards[e.id], config)
            if math.isnan(value):
                continue
            memory = f"rae/{e.task.source}/{name}"
            baseline = state.get(memory, 0.0)
            state[memory] = config.rae_decay * baseline + (1 - config.rae_decay) * value
            own = [each for each in _taken(e) if each.agent == name]
            for k, each in enumerate(reversed(own)):
                found |= {key: (value - baseline) * config.discount**k for key in _keys(e, [each])}
    return found


def success(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """1 for every taken turn of a correct episode, all others dropped: rejection sampling as a
    credit rule. Takes written turns."""
    rewards = team_rewards(episodes, config)
    right = [e for e in episodes if rewards[e.id] >= config.success_threshold]  # NaN is not
    return {_key(e, each): 1.0 for e in right for each in _taken(e) if not each.saw_gold}


def counterfactual(episodes: Sequence[Episode], config: CreditConfig, state: State) -> Advantages:
    """What replays have shown a turn to be worth: the rewards named `counterfactual` that
    `trainers.replay` has put on episodes.

    Difference rewards, or C3 (arXiv:2603.06859) where turns have siblings; then all siblings are
    trained.
    """
    found = Advantages()
    for e in episodes:
        keys = set(_keys(e, e.turns)) if e.error is None else set()
        for r in e.rewards:
            if (
                r.name == "counterfactual"
                and r.turn is not None
                and (e.id, r.turn, r.sibling) in keys
                and not math.isnan(r.value)
            ):
                found[e.id, r.turn, r.sibling] = r.value
    return found


RULES: dict[str, Callable[[Sequence[Episode], CreditConfig, State], Advantages]] = {
    "team": team,
    "agent": agent,
    "turn": turn,
    "grpo": grpo,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "at_grpo": at_grpo,
    "dr_mas": dr_mas,
    "rae": rae,
    "success": success,
    "counterfactual": counterfactual,
}


# what rules share


def leave_one_out(values: Sequence[float], counts: Sequence[float] | None = None) -> list[float]:
    """Each value minus the mean of the others, weighted by `counts` (of replays behind each value)
    if given."""
    counts = counts or [1.0] * len(values)
    total, mass = math.fsum(n * v for n, v in zip(counts, values, strict=True)), sum(counts)
    return [v - (total - n * v) / (mass - n) for n, v in zip(counts, values, strict=True)]


def _keys(episode: Episode, turns: Iterable[Turn]) -> list[TurnKey]:
    return [_key(episode, each) for each in _trained(turns)]


def _per_group(
    episodes: Sequence[Episode],
    rewards: Mapping[str, float],
    rule: Callable[[list[float]], list[float]],
) -> Advantages:
    """One advantage per episode, to all its taken turns; groups without signal are left out."""
    found = Advantages()
    for group in groups(episodes).values():
        scored = [e for e in group if not math.isnan(rewards[e.id])]
        values = [rewards[e.id] for e in scored]
        if not _flat(values):
            for e, advantage in zip(scored, rule(values), strict=True):
                found |= dict.fromkeys(_keys(e, _taken(e)), advantage)
    return found


def _rows(rows: Mapping[tuple, Mapping[TurnKey, float]], config: CreditConfig) -> Advantages:
    """GRPO inside each group of turns; groups without signal are left out."""
    std = _spread([value for group in rows.values() for value in group.values()] or [0.0])
    found = Advantages()
    for group in rows.values():
        values = list(group.values())
        if not _flat(values):
            found |= zip(group, _centred(values, config, std), strict=True)
    return found
