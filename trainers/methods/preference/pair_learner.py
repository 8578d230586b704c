"""The DPO update that SysDPO and ScoreFlow share: policy and reference log-probs per turn, the
joint margin (`update/preference_loss.py`), then each adapter's weighted backward pass.

Only scalars couple the agents (`preference_loss.py`): turns are scored by forward passes first,
then each adapter learns from its own turns, each with the number that `margin_gradient` gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....agents.settings import setting
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import TrainingSequence, samples
from ...credit.pairs import Pair
from ...update.learner import Learner
from ...update.losses.inputs import LossInputs
from ...update.losses.nll import weighted_nll
from ...update.losses.statistics import Stats
from ...update.minibatches import merge_results, minibatches
from ...update.optimizer_step import UpdateResult
from ...update.preference_loss import MarginConfig, MarginGradient, RunLogRatio, margin_gradient
from .components import Component

Key = (
    TurnKey | tuple[str, str]
)  # of a turn, or of what a component made: (episode id, component's name)


@dataclass
class PairLearnerConfig(MarginConfig):
    """A loss of margins (`MarginConfig`), what they are measured against, and how often pairs are
    gone through."""

    reference: str = setting(
        "start: the adapters as the run began (off, unless they have an init); step: as the step"
        " began",
        "start",
        choices=("start", "step"),
    )
    train_batch_size: int = setting(
        "pairs of one optimizer update; 0 takes all of the step", 0, at_least=0
    )
    num_train_epochs: int = setting("times a step's pairs are gone through", 1, at_least=1)


@dataclass(frozen=True)
class PairUpdates:
    """What a step's pairs did. `updates`: per policy, all updates joined. `metrics`: the losses and
    margins before each update, in the mean. `dropped`: turns that cannot be scored, by (agent,
    reason)."""

    updates: dict[str, UpdateResult]
    metrics: dict[str, Any]
    dropped: Counter[tuple[str, str]]


class PairLearner:
    """Moves a run's adapters by pairs of episodes.

    Args:
        config: usually the run's own, which has these fields besides its others.
        components: other parts of the system that learn in the same sum (`components.py`).
    """

    def __init__(
        self, learner: Learner, config: PairLearnerConfig, components: Sequence[Component] = ()
    ) -> None:
        self.learner, self.config, self.components = learner, config, components
        self.references: dict[
            TurnKey, float
        ] = {}  # of stored episodes, for good: they do not change

    def learn(self, step: int, pairs: Sequence[Pair]) -> PairUpdates:
        """Go through the pairs, `num_train_epochs` times in minibatches. Without a pair nothing
        moves, and people are told."""
        sequences, dropped = self.samples_of(pairs)
        if step == 1 and sequences:
            self.learner.show(sequences)
        references = self.reference_scores(sequences)
        size, seed = (
            self.config.train_batch_size or max(len(pairs), 1),
            self.learner.config.seed + step,
        )
        done: list[dict[str, UpdateResult]] = []
        pushes: list[MarginGradient[Key]] = []
        for number, some in enumerate(minibatches(pairs, size, self.config.num_train_epochs, seed)):
            updated, pushed = self.update(step, number, some, sequences, references)
            done.append(updated)
            pushes.append(pushed)
        if not pairs:
            self.learner.log.warn(
                f"step {step}: no two episodes of a task differ in score; nothing to learn from"
            )
        return PairUpdates(
            merge_results(done),
            {"pairs": len(pairs), "updates": len(done), **_means(pushes)},
            dropped,
        )

    @property
    def voters(self) -> dict[str, str]:
        """Agent -> policy of those whose turns are scored: what is frozen stands still, but among
        drafts its probabilities weigh."""
        if self.config.mode != "sampling":
            return self.learner.policy_of
        return self.learner.spoken_policies

    def samples_of(
        self, pairs: Iterable[Pair]
    ) -> tuple[list[TrainingSequence], Counter[tuple[str, str]]]:
        """The token sequences of every turn that has a vote."""
        chosen = {episode.id: episode for pair in pairs for episode in pair.episodes}.values()
        everything = {(e.id, t.index, t.sibling): 1.0 for e in chosen for t in e.turns if t.taken}
        return samples(chosen, everything, self.voters, ratios=False)

    def reference_scores(self, sequences: Sequence[TrainingSequence]) -> Mapping[TurnKey, float]:
        """log p of every turn under the reference; for stored episodes each is computed once in a
        run."""
        if self.config.reference == "step":
            return self.learner.turn_logprobs(sequences)
        if not self.learner.config.episodes:
            self.references.clear()
        unknown = [sample for sample in sequences if not self.references.keys() >= set(sample.keys)]
        self.references |= self.learner.turn_logprobs(unknown, reference=True)
        return self.references

    def update(
        self,
        step: int,
        number: int,
        pairs: Sequence[Pair],
        sequences: Sequence[TrainingSequence],
        references: Mapping[TurnKey, float],
    ) -> tuple[dict[str, UpdateResult], MarginGradient[Key]]:
        """One optimizer update of every policy and component from these pairs: score, push,
        learn."""
        episodes = {episode.id: episode for pair in pairs for episode in pair.episodes}
        mine = [sample for sample in sequences if sample.episode in episodes]
        votes = self.votes(
            episodes, mine, references, draw := self.learner.config.seed + 1000 * step + number
        )
        pushed = margin_gradient(pairs, votes, self.config)
        self.push_components(episodes, pushed, draw)
        weights = {key: weight for key, weight in pushed.weights.items() if len(key) == 3}
        weighted, _ = samples(episodes.values(), weights, self.learner.policy_of, ratios=False)
        done = self.learner.learn(step, weighted, self.loss)
        for result in done.values():
            result.stats["loss"] = pushed.loss
        return done, pushed

    def votes(
        self,
        episodes: Mapping[str, Episode],
        sequences: Sequence[TrainingSequence],
        references: Mapping[TurnKey, float],
        draw: int,
    ) -> dict[Key, RunLogRatio]:
        """What every part of these episodes says now, and said under the reference."""
        agents = {
            (e.id, t.index, t.sibling): (t.agent, len(t.token_ids))
            for e in episodes.values()
            for t in e.turns
        }
        ratios: dict[Key, RunLogRatio] = {}
        for key, now in self.learner.turn_logprobs(sequences).items():
            agent, tokens = agents[key]
            ratios[key] = RunLogRatio(
                key[0], agent, self.voters[agent], now, references[key], tokens
            )
        for component in self.components:
            for episode in episodes.values():
                with torch.no_grad():
                    ratio = float(component.log_ratio(episode, draw))
                ratios[episode.id, component.name] = RunLogRatio(
                    episode.id, component.name, component.name, ratio, 0.0
                )
        return ratios

    def push_components(
        self, episodes: Mapping[str, Episode], pushed: MarginGradient[Key], draw: int
    ) -> None:
        for component in self.components:
            for name, episode in episodes.items():
                weight = pushed.weights[name, component.name]
                if weight:
                    (-weight * component.log_ratio(episode, draw)).backward()
            component.step()

    def loss(self, inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
        """-sum(weight x log p): its gradient is the preference loss's, its value is not."""
        return weighted_nll(inputs.logp, inputs.advantage, 1.0)


def _means(pushes: Sequence[MarginGradient[Key]]) -> dict[str, Any]:
    """Means over updates of what the pairs said before each."""
    if not pushes:
        return {}
    count = len(pushes)
    return {
        "loss": sum(p.loss for p in pushes) / count,
        "first_loss": pushes[0].loss,
        "accuracy": sum(p.accuracy for p in pushes) / count,
        "margin": sum(sum(p.margins) / len(p.margins) for p in pushes) / count,
        "margins": {
            agent: sum(p.by_agent.get(agent, 0.0) for p in pushes) / count
            for agent in pushes[-1].by_agent
        },
    }
