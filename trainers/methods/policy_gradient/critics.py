"""Critics of a team: which scalar head judges which turn, and what a step's episodes teach by their
word.

A critic is a head (`heads.py`) that says, before each token an agent samples, what that turn will
have earned. From its word and the rewards of turns come an advantage per token, which the policy
learns from, and a return per token, which the critic does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ....agents.settings import help_of
from ....agents.types import BASE, SettingError
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import TrainingSequence
from ...loop.run import Run
from ...model.logprobs import token_logprobs
from ...update.gae import gae, token_rewards, whiten
from ...update.optimizer_step import forward_only
from ...update.scalar_heads import HeadSpec


@dataclass
class CriticConfig:
    """Who judges a turn, and how rewards and the critic's word become advantages."""

    gamma: float = help_of("discount per token", 1.0)
    lam: float = help_of(
        "lambda of generalised advantage estimation: 1 trusts the rewards, 0 the critic", 0.95
    )
    across_turns: bool = help_of(
        "an agent's successive turns are one sequence; otherwise each turn is one", False
    )
    whiten_advantages: bool = help_of(
        "advantages of turns that share a critic get mean 0 and variance 1 over their tokens", True
    )
    kl_coef: float = help_of("weight of the KL to the base in the rewards of tokens", 0.0)
    cliprange_value: float | None = help_of(
        "a step moves a critic's word by at most this; null is no bound", 0.2
    )
    value_learning_rate: float = help_of(
        "peak learning rate of the critics; 0 takes the policy's", 0.0
    )
    value_heads: str = help_of(
        "a critic per policy, or per agent and turn: policy or turn", "policy"
    )
    value_turns: int = help_of("turn: critics per agent; later turns share the last one", 2)

    def __post_init__(self) -> None:
        if self.value_heads not in ("policy", "turn"):
            raise SettingError(f"value_heads: expected policy or turn, got {self.value_heads!r}")
        for name, high in (
            ("gamma", 1.0),
            ("lam", 1.0),
            ("kl_coef", math.inf),
            ("value_learning_rate", math.inf),
        ):
            if not 0 <= getattr(self, name) <= high:
                raise SettingError(
                    f"{name}: expected a number from 0 to {high}, got {getattr(self, name)}"
                )
        if self.cliprange_value is not None and not self.cliprange_value > 0:
            raise SettingError(
                f"cliprange_value: expected a number above 0 or null, got {self.cliprange_value}"
            )
        if self.value_turns < 1:
            raise SettingError(f"value_turns: expected at least 1, got {self.value_turns}")


def critics(run: Run, config: CriticConfig) -> list[HeadSpec]:
    """One scalar head per policy that learns, or per agent and turn. Its LoRA has the policy's
    shape and base."""
    found: dict[str, HeadSpec] = {}
    for agent in run.system.specs:
        policy = run.policies[agent.policy]
        if policy.trainable and policy.has_adapter:
            names = (
                [f"{agent.name}-{n}" for n in range(config.value_turns)]
                if config.value_heads == "turn"
                else [policy.name]
            )
            rate = config.value_learning_rate or policy.learning_rate
            found |= {name: HeadSpec(name, policy.base, policy.adapter, rate) for name in names}
    return list(found.values())


def critic_of(run: Run, episodes: Sequence[Episode], config: CriticConfig) -> dict[TurnKey, str]:
    """The name of the critic that judges each turn of an agent that learns."""
    found: dict[TurnKey, str] = {}
    policy_of = run.policy_of
    for episode in episodes:
        calls: dict[str, list[int]] = {}
        for turn in episode.turns:
            mine = calls.setdefault(turn.agent, [])
            if turn.index not in mine:  # siblings are answers to one call
                mine.append(turn.index)
            if turn.agent in policy_of:
                number = min(mine.index(turn.index), config.value_turns - 1)
                name = (
                    f"{turn.agent}-{number}"
                    if config.value_heads == "turn"
                    else policy_of[turn.agent]
                )
                found[episode.id, turn.index, turn.sibling] = name
    return found


@dataclass
class CriticBatch:
    """What a step's episodes teach: token sequences, and numbers of all their N trained tokens, in
    the order of the samples.

    spans: where the tokens of each turn stand.    critic: the one that judges each token [N].
    values: what it said of them before the step [N].    kl: log p - log p of the base, when they were sampled [N]; zeros if not needed.
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
        made: list[TrainingSequence] = []
        parts = self.advantages.split([sample.num_trained for sample in self.samples])
        for sample, part in zip(self.samples, parts, strict=True):
            numbers = iter(part.tolist())
            made.append(
                replace(
                    sample,
                    advantages=tuple(next(numbers) if trained else 0.0 for trained in sample.mask),
                )
            )
        loud = {sample.policy for sample in made if always or any(sample.advantages)}
        return [sample for sample in made if sample.policy in loud]


def critic_batch(
    run: Run,
    episodes: Sequence[Episode],
    found: list[TrainingSequence],
    scores: Mapping[TurnKey, float],
    critic: Mapping[TurnKey, str],
    config: CriticConfig,
) -> CriticBatch:
    """Judge every trained token by its critic, as it is now, and turn that and the scores of turns
    into advantages and returns.

    Where all turns that share a critic have one score, there is nothing to compare: their
    advantages are 0, for whitening would make what the critic still gets wrong as large as any.
    Their returns stay.
    """
    spans = spans_of(found)
    names = [critic[key] for sample in found for key in sample.keys]
    values, kl = torch.zeros(len(names)), torch.zeros(len(names))
    for name in sorted(set(names)):
        parts = _judged_by(found, names, name)
        values[torch.cat([numbers for _, numbers in parts])] = run.head(name).read(
            [sample for sample, _ in parts], run.ranks
        )
    if config.kl_coef:
        kl = torch.tensor(
            [p for s in found for p, trained in zip(s.logprobs, s.mask, strict=True) if trained]
        )
        kl -= reference_logprobs(run, found)
    advantages, returns = (
        torch.zeros(len(names), dtype=torch.float64),
        torch.zeros(len(names), dtype=torch.float64),
    )
    for chain in sequences(episodes, spans, config.across_turns):
        rewards = torch.cat(
            [token_rewards(scores[key], kl[_slice(spans[key])], config.kl_coef) for key in chain]
        )
        numbers = torch.cat([torch.arange(spans[key].start, spans[key].stop) for key in chain])
        advantages[numbers], returns[numbers] = gae(
            rewards, values[numbers], config.gamma, config.lam
        )
    lesson = CriticBatch(found, spans, names, values, kl, advantages, returns)
    for name in lesson.critics:
        mine = lesson.tokens(name)
        if len({scores[key] for key in spans if critic[key] == name}) < 2:
            advantages[mine] = 0.0
        elif config.whiten_advantages:
            advantages[mine] = whiten(advantages[mine])
    return lesson


def spans_of(found: Sequence[TrainingSequence]) -> dict[TurnKey, range]:
    """Where the tokens of each trained turn stand among all trained tokens: a turn's stand
    together."""
    spans: dict[TurnKey, range] = {}
    for number, key in enumerate(key for sample in found for key in sample.keys):
        spans[key] = range(spans[key].start if key in spans else number, number + 1)
    return spans


def sequences(
    episodes: Sequence[Episode], spans: Mapping[TurnKey, range], across_turns: bool
) -> list[list[TurnKey]]:
    """Trained turns in the sequences over which advantages are estimated: each alone, or all that
    an agent took, in order."""
    found: dict[tuple, list[TurnKey]] = {}
    for episode in episodes:
        for turn in episode.turns:
            key = (episode.id, turn.index, turn.sibling)
            if key in spans:
                found.setdefault(
                    (episode.id, turn.agent) if across_turns and turn.taken else key, []
                ).append(key)
    return list(found.values())


def reference_logprobs(run: Run, found: Sequence[TrainingSequence]) -> torch.Tensor:
    """log p of every trained token under its base with adapters off, at the temperature it was
    sampled at [N]. The same on every rank."""
    parts = list(
        torch.zeros(sum(s.num_trained for s in found)).split([s.num_trained for s in found])
    )
    for base in run.bases.values():
        mine = [number for number, sample in enumerate(found) if sample.policy in base.policies]
        with base.adapters.active(BASE) as model:
            flat = forward_only(
                [found[n] for n in mine],
                lambda batch, model=model: token_logprobs(model, batch)[0],
                run.config.tokens_per_batch,
                base.optimizers.layout,
                run.ranks,
            )
        for number, part in zip(
            mine, flat.split([found[n].num_trained for n in mine]), strict=True
        ):
            parts[number].copy_(part)
    return torch.cat(parts)


def _judged_by(
    found: Sequence[TrainingSequence], names: Sequence[str], critic: str
) -> list[tuple[TrainingSequence, torch.Tensor]]:
    parts, start = [], 0
    for sample in found:
        mine = [i for i in range(start, start + sample.num_trained) if names[i] == critic]
        if mine:
            parts.append((_only(sample, {i - start for i in mine}), torch.tensor(mine)))
        start += sample.num_trained
    return parts


def _only(sample: TrainingSequence, wanted: set[int]) -> TrainingSequence:
    """The sample with these of its trained tokens (by number); the others are context."""
    if len(wanted) == sample.num_trained:
        return sample
    number, mask = -1, []
    for trained in sample.mask:
        number += trained
        mask.append(int(bool(trained) and number in wanted))
    return replace(
        sample,
        mask=tuple(mask),
        sequence=tuple(s if m else -1 for s, m in zip(sample.sequence, mask, strict=True)),
    )


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
