"""Critics (value functions) of a team: which scalar head judges which turn, and the advantages and
returns that follow.

A critic is a head (`scalar_heads.py`) that predicts, before each token an agent samples, what that
turn will have earned. From its values and the rewards of turns come an advantage per token, which
the policy learns from, and a return per token, which the critic does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ....agents.settings import Settings, setting
from ....agents.types import AgentSpec, PolicySpec
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import TrainingSequence
from ...credit.group import constant
from ...update.gae import gae, token_rewards, whiten
from ...update.learner import Learner
from ...update.scalar_heads import HeadSpec


@dataclass
class CriticConfig(Settings):
    """Who judges a turn, and how rewards and the critic's word become advantages."""

    gamma: float = setting("discount per token", 1.0, at_least=0, at_most=1)
    lam: float = setting(
        "lambda of generalised advantage estimation: 1 trusts the rewards, 0 the critic",
        0.95,
        at_least=0,
        at_most=1,
    )
    across_turns: bool = setting(
        "an agent's successive turns are one sequence; otherwise each turn is one", False
    )
    whiten_advantages: bool = setting(
        "advantages of turns that share a critic get mean 0 and variance 1 over their tokens", True
    )
    kl_coef: float = setting(
        "weight of the KL to the policy as the run began in the rewards of tokens", 0.0, at_least=0
    )
    cliprange_value: float | None = setting(
        "a step moves a critic's value by at most this; null is no bound",
        0.2,
        above=0,
        finite=False,
    )
    value_learning_rate: float = setting(
        "peak learning rate of the critics; 0 takes the policy's", 0.0, at_least=0
    )
    value_heads: str = setting(
        "a critic per policy, or per agent and turn: policy or turn",
        "policy",
        choices=("policy", "turn"),
    )
    value_turns: int = setting(
        "turn: critics per agent; later turns share the last one", 2, at_least=1
    )


def critics(
    agents: Sequence[AgentSpec], policies: Mapping[str, PolicySpec], config: CriticConfig
) -> list[HeadSpec]:
    """One scalar head per policy that learns (also of one that a value may name later), or per
    agent and turn. Its LoRA has the policy's shape and base."""
    if config.value_heads == "turn":
        names = {
            f"{agent.name}-{n}": policies[agent.policy]
            for agent in agents
            for n in range(config.value_turns)
        }
    else:
        names = dict(policies)
    return [
        HeadSpec(
            name, policy.base, policy.adapter, config.value_learning_rate or policy.learning_rate
        )
        for name, policy in names.items()
        if policy.trainable and policy.has_adapter
    ]


def critic_of(
    policy_of: Mapping[str, str], episodes: Sequence[Episode], config: CriticConfig
) -> dict[TurnKey, str]:
    """The name of the critic that judges each turn of an agent that learns."""
    critics: dict[TurnKey, str] = {}
    for key, (agent, call) in calls(episodes).items():
        if agent in policy_of:
            critics[key] = (
                f"{agent}-{min(call, config.value_turns - 1)}"
                if config.value_heads == "turn"
                else policy_of[agent]
            )
    return critics


def calls(episodes: Sequence[Episode]) -> dict[TurnKey, tuple[str, int]]:
    """Every turn's agent, and which of the agent's calls in the episode it answers: 0, 1, ..."""
    numbers: dict[TurnKey, tuple[str, int]] = {}
    for episode in episodes:
        of_agent: dict[str, list[int]] = {}
        for turn in episode.turns:
            mine = of_agent.setdefault(turn.agent, [])
            if turn.index not in mine:  # siblings are answers to one call
                mine.append(turn.index)
            key = (episode.id, turn.index, turn.sibling)
            numbers[key] = (turn.agent, mine.index(turn.index))
    return numbers


@dataclass
class CriticBatch:
    """What a step's episodes teach: token sequences, and numbers of all their N trained tokens, in
    the order of the samples.

    spans: where the tokens of each turn stand.
    critic: the one that judges each token [N].
    values: what it predicted for them before the step [N].
    kl: log p - log p of the reference (the policy as the run began), when they were sampled [N];
        zeros if not needed.
    advantages, returns: [N] float64, see `gae`.
    """

    samples: list[TrainingSequence]
    spans: dict[TurnKey, range]
    critic: list[str]
    values: torch.Tensor
    kl: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def critics(self) -> list[str]:
        return sorted(set(self.critic))

    def tokens(self, critic: str) -> torch.Tensor:
        """Numbers of the tokens that this critic judges."""
        return torch.tensor(
            [i for i, name in enumerate(self.critic) if name == critic], dtype=torch.long
        )

    def tokens_of(self, policy: str) -> torch.Tensor:
        """Numbers of the tokens that this policy sampled."""
        own = [
            sample.policy == policy for sample in self.samples for _ in range(sample.num_trained)
        ]
        return torch.tensor(own, dtype=torch.bool).nonzero()[:, 0]

    def judged_by(self, critic: str) -> list[tuple[TrainingSequence, torch.Tensor]]:
        """The samples with this critic's turns only, each with the numbers of its tokens."""
        return _judged_by(self.samples, self.critic, critic)

    def taught(self, always: bool = False) -> list[TrainingSequence]:
        """The samples with these advantages. Those of a policy none of which is above or below 0
        are left out, unless `always`."""
        taught: list[TrainingSequence] = []
        parts = self.advantages.split([sample.num_trained for sample in self.samples])
        for sample, part in zip(self.samples, parts, strict=True):
            numbers = iter(part.tolist())
            taught.append(
                replace(
                    sample,
                    advantages=tuple(next(numbers) if trained else 0.0 for trained in sample.mask),
                )
            )
        loud = {sample.policy for sample in taught if always or any(sample.advantages)}
        return [sample for sample in taught if sample.policy in loud]


def critic_batch(
    learner: Learner,
    episodes: Sequence[Episode],
    samples: list[TrainingSequence],
    scores: Mapping[TurnKey, float],
    critic: Mapping[TurnKey, str],
    config: CriticConfig,
) -> CriticBatch:
    """Judge every trained token by its critic, as it is now, and turn that and the scores of turns
    into advantages and returns.

    Where the turns of a critic leave nothing to compare (`incomparable`), their advantages are 0,
    for whitening would make what the critic still gets wrong as large as any. Their returns stay.
    """
    spans = spans_of(samples)
    names = [critic[key] for sample in samples for key in sample.keys]
    values, kl = torch.zeros(len(names)), torch.zeros(len(names))
    for name in sorted(set(names)):
        parts = _judged_by(samples, names, name)
        values[torch.cat([numbers for _, numbers in parts])] = learner.head(name).read(
            [sample for sample, _ in parts], learner.ranks
        )
    if config.kl_coef:
        kl = torch.tensor(
            [p for s in samples for p, trained in zip(s.logprobs, s.mask, strict=True) if trained]
        )
        kl -= learner.reference_logprobs(samples)
    advantages, returns = (
        torch.zeros(len(names), dtype=torch.float64),
        torch.zeros(len(names), dtype=torch.float64),
    )
    chains = sequences(episodes, spans, config.across_turns)
    for chain in chains:
        rewards = torch.cat(
            [token_rewards(scores[key], kl[_slice(spans[key])], config.kl_coef) for key in chain]
        )
        numbers = torch.cat([torch.arange(spans[key].start, spans[key].stop) for key in chain])
        advantages[numbers], returns[numbers] = gae(
            rewards, values[numbers], config.gamma, config.lam
        )
    lesson = CriticBatch(samples, spans, names, values, kl, advantages, returns)
    ahead = scores_ahead(chains, scores)
    places = calls(episodes)
    for name in lesson.critics:
        mine = lesson.tokens(name)
        if incomparable({key: ahead[key] for key in spans if critic[key] == name}, places):
            advantages[mine] = 0.0
        elif config.whiten_advantages:
            advantages[mine] = whiten(advantages[mine])
    return lesson


def scores_ahead(
    chains: Sequence[Sequence[TurnKey]], scores: Mapping[TurnKey, float]
) -> dict[TurnKey, float]:
    """What a turn and those after it in its sequence have earned."""
    return {
        key: math.fsum(scores[later] for later in chain[number:])
        for chain in chains
        for number, key in enumerate(chain)
    }


def incomparable(ahead: Mapping[TurnKey, float], places: Mapping[TurnKey, tuple[str, int]]) -> bool:
    """Do these turns leave nothing to compare: is the same ahead of all, or of every agent's n-th
    turn in all episodes? A turn's place alone (a discount, rewards of turns) is no merit.

    Of a single episode the place is not told from the merit; then only the former counts.
    """
    by_place: dict[tuple[str, int], list[float]] = {}
    for key, value in ahead.items():
        by_place.setdefault(places[key], []).append(value)
    repeated = [values for values in by_place.values() if len(values) > 1]
    return constant(list(ahead.values())) or bool(repeated and all(map(constant, repeated)))


def spans_of(samples: Sequence[TrainingSequence]) -> dict[TurnKey, range]:
    """Where the tokens of each trained turn stand among all trained tokens: a turn's stand
    together."""
    spans: dict[TurnKey, range] = {}
    for number, key in enumerate(key for sample in samples for key in sample.keys):
        spans[key] = range(spans[key].start if key in spans else number, number + 1)
    return spans


def sequences(
    episodes: Sequence[Episode], spans: Mapping[TurnKey, range], across_turns: bool
) -> list[list[TurnKey]]:
    """Trained turns in the sequences over which advantages are estimated: each alone, or all that
    an agent took, in order."""
    chains: dict[tuple, list[TurnKey]] = {}
    for episode in episodes:
        for turn in episode.turns:
            key = (episode.id, turn.index, turn.sibling)
            if key in spans:
                chains.setdefault(
                    (episode.id, turn.agent) if across_turns and turn.taken else key, []
                ).append(key)
    return list(chains.values())


def _judged_by(
    samples: Sequence[TrainingSequence], names: Sequence[str], critic: str
) -> list[tuple[TrainingSequence, torch.Tensor]]:
    parts, start = [], 0
    for sample in samples:
        mine = [i for i in range(start, start + sample.num_trained) if names[i] == critic]
        if mine:
            parts.append((_only(sample, {i - start for i in mine}), torch.tensor(mine)))
        start += sample.num_trained
    return parts


def _only(sample: TrainingSequence, numbers: set[int]) -> TrainingSequence:
    """The sample with these of its trained tokens (by number); the others are context."""
    if len(numbers) == sample.num_trained:
        return sample
    number, mask = -1, []
    for trained in sample.mask:
        number += trained
        mask.append(int(bool(trained) and number in numbers))
    return replace(
        sample,
        mask=tuple(mask),
        sequence=tuple(s if m else -1 for s, m in zip(sample.sequence, mask, strict=True)),
    )


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
