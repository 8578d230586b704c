"""What a policy-gradient update is taken over: the turns with an advantage, and the totals that its
loss is divided by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from ...rollouts.types import Episode, TurnKey
from ..batching.samples import TrainingSequence, denominators, samples
from .losses.policy_gradient import LossConfig
from .optimizer_step import UpdateOptions


def policy_batch(
    episodes: Sequence[Episode],
    advantages: Mapping[TurnKey, float],
    in_constant_groups: Iterable[TurnKey],
    policy_of: Mapping[str, str],
    config: LossConfig,
    learning: Collection[str] = (),
) -> tuple[list[TrainingSequence], Counter[tuple[str, str]], UpdateOptions]:
    """Token sequences, counts by (agent, reason) of turns that are left out, and how the update is
    fed. `policy_of` and `learning`: see `samples`.

    As in TRL's GRPOTrainer the loss is divided by all tokens (or turns) that were compared, also
    those of advantage 0 and those `in_constant_groups`. They have no gradient and are left
    out of the forward pass, unless `beta` or `entropy_coef` give them one.
    """
    episodes = list(episodes)
    everything = {**dict.fromkeys(in_constant_groups, 0.0), **advantages}
    sequences, dropped = samples(
        episodes, everything, policy_of, keep_zeros=True, learning=learning
    )
    totals = denominators(sequences)
    if not (config.beta or config.entropy_coef):
        sequences, dropped = samples(episodes, advantages, policy_of, learning=learning)
    how = UpdateOptions(
        reference=config.beta > 0, entropy_grad=bool(config.entropy_coef), totals=totals
    )
    return sequences, dropped, how
