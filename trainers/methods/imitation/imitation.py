"""Imitation: several epochs of weighted supervised updates of every policy on its own turns.

What supervised methods share: they differ in which turns they keep, with which weight, and what
they play. The loss of an update is -sum(weight x log p) / trained tokens over a minibatch of one
policy's sequences, on exactly the tokens that were sampled (or written: a repaired turn re-encoded
for its original prompt); prompts, tools and other agents' words are read and not trained.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from ....agents.seeds import derive_seed
from ....agents.settings import Settings, setting
from ....agents.types import Completion, SettingError, Turn
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import TrainingSequence, samples
from ...errors import RunError
from ...update.learner import Learner
from ...update.losses.inputs import LossInputs
from ...update.losses.nll import weighted_nll
from ...update.losses.statistics import Stats
from ...update.minibatches import merge_results, minibatches
from ...update.optimizer_step import UpdateResult
from ..trl_control import Row, TrainerChoice, TRLExample, learn_with_trl


@dataclass
class ImitationConfig(TrainerChoice):
    """How kept turns are learnt from."""

    num_train_epochs: int = setting("passes over the kept turns of a step", 2, at_least=1)
    train_batch_size: int = setting("sequences of a policy per optimizer update", 8, at_least=1)


@dataclass
class IterationConfig(Settings):
    """Iterations of play and imitation. To come before `RunConfig` among the parents of a config:
    an iteration is a step of the run."""

    max_iterations: int = setting("iterations: play, select, imitate", 1, at_least=0)
    max_steps: int = setting("the same as max_iterations; leave it out", 0, at_least=0)
    start_from: str = setting(
        "what an iteration trains: the last adapters (last), or new ones on the base (base)",
        "last",
        choices=("last", "base"),
    )

    def check(self) -> None:
        if self.max_steps not in (0, self.max_iterations):
            raise SettingError(
                "max_steps: an iteration is a step, so set max_iterations alone; got"
                f" {self.max_steps}, {self.max_iterations}"
            )
        self.max_steps = self.max_iterations


@dataclass(frozen=True)
class ImitationResult:
    """What imitation did. `updates`: per policy, all updates joined. `before`, `after`: per policy
    the mean negative log-probability per trained token of all it learnt from, in nats at
    temperature 1. `dropped`: turns that had a weight but cannot be trained, by (agent, reason)."""

    updates: dict[str, UpdateResult]
    before: dict[str, float]
    after: dict[str, float]
    dropped: Counter[tuple[str, str]]

    @property
    def untrained(self) -> dict[str, int]:
        """`dropped` for metrics."""
        return {
            f"{agent}: {reason}": count for (agent, reason), count in sorted(self.dropped.items())
        }

    def into(self, rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The rows of a step's metrics (see `Trainer.rows`) with the loss on all kept turns before
        and after."""
        measured = {
            p: {"nll_before": self.before[p], "nll_after": self.after[p]} for p in self.after
        }
        return {policy: {**row, **measured.get(policy, {})} for policy, row in rows.items()}


def fit_turns(
    learner: Learner,
    step: int,
    episodes: Sequence[Episode],
    weights: Mapping[TurnKey, float],
    config: ImitationConfig,
) -> ImitationResult:
    """Train every policy on its turns that have a weight: `num_train_epochs` seeded passes in
    minibatches.

    Raises `RunError` if nothing is left to learn from; the store keeps what was played.
    """
    sequences, dropped = samples(
        [encoded(learner, episode) for episode in episodes],
        weights,
        learner.policy_of,
        ratios=False,
    )
    if not sequences:
        reasons = (
            ", ".join(
                f"{count} {agent}: {reason}" for (agent, reason), count in sorted(dropped.items())
            )
            or "no turn was kept"
        )
        raise RunError(
            f"step {step}: nothing to learn from ({reasons}); the episodes are stored, no adapter"
            " was changed"
        )
    if step == 1:
        learner.show(sequences)
    before = learner.mean_nll(sequences)
    learn = _with_trl if config.trainer == "trl" else _epochs
    updates = learn(learner, step, sequences, config)
    return ImitationResult(updates, before, learner.mean_nll(sequences), dropped)


def teacher_text(learner: Learner, turn: Turn, text: str) -> Completion:
    """A text as an answer to the turn's own prompt, in the tokens of its agent's base."""
    tokens = learner.base_of(learner.policy_of[turn.agent]).tokens
    return tokens.write(turn.prompt_ids or tokens.prompt(turn.messages), text)


def encoded(learner: Learner, episode: Episode) -> Episode:
    """The episode with tokens for written turns that are text only. What was sampled is never
    encoded."""

    def with_tokens(turn: Turn) -> Turn:
        if (
            turn.source == "sampled"
            or turn.token_ids
            or not turn.text
            or turn.agent not in learner.policy_of
        ):
            return turn
        completion = teacher_text(learner, turn, turn.text)
        return dataclasses.replace(
            turn,
            text=completion.text,
            prompt_ids=completion.prompt_ids,
            token_ids=completion.token_ids,
        )

    turns = tuple(map(with_tokens, episode.turns))
    return episode if turns == episode.turns else dataclasses.replace(episode, turns=turns)


def nll_loss(inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
    """-sum(weight x log p) / tokens of the step; a turn's weight stands in `advantage`."""
    return weighted_nll(inputs.logp, inputs.advantage, inputs.total.tokens)


def _epochs(
    learner: Learner, step: int, sequences: Sequence[TrainingSequence], config: ImitationConfig
) -> dict[str, UpdateResult]:
    """Minibatches are a policy's own, so that how often it is updated does not depend on the other
    policies' turns."""
    seed = derive_seed(learner.config.seed, "imitate", step)
    plans = [
        list(
            minibatches(
                own, config.train_batch_size, config.num_train_epochs, derive_seed(seed, policy)
            )
        )
        for policy, own in by_policy(sequences).items()
    ]
    done = []
    for parts in zip_longest(*plans, fillvalue=[]):
        done.append(learner.learn(step, [sample for part in parts for sample in part], nll_loss))
    return merge_results(done)


def by_policy(sequences: Sequence[TrainingSequence]) -> dict[str, list[TrainingSequence]]:
    """Samples of each policy, policies sorted by name."""
    return {
        policy: [s for s in sequences if s.policy == policy]
        for policy in sorted({s.policy for s in sequences})
    }


def _with_trl(
    learner: Learner, step: int, sequences: Sequence[TrainingSequence], config: ImitationConfig
) -> dict[str, UpdateResult]:
    """The same sequences, masks and minibatch size through TRL's SFTTrainer. It knows no
    weights."""
    weights = {
        advantage for s in sequences for advantage, m in zip(s.advantages, s.mask, strict=True) if m
    }
    if weights != {1.0}:
        raise SettingError(
            f"trainer trl: its SFT knows no weights, and these turns have {sorted(weights)[:5]};"
            " use trainer: marlora"
        )
    lessons = {
        policy: TRLExample([_row(s) for s in own], sum(s.num_trained for s in own))
        for policy, own in by_policy(sequences).items()
    }

    def make(model: Any, tokenizer: Any, rows: Sequence[Row], shared: dict[str, Any]) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(
            num_train_epochs=config.num_train_epochs,
            per_device_train_batch_size=config.train_batch_size,
            dataset_kwargs={"skip_prepare_dataset": True},
            **shared,
        )
        return SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([dict(r) for r in rows]),
            processing_class=tokenizer,
        )

    return learn_with_trl(learner, step, lessons, make)


def _row(sample: TrainingSequence) -> Row:
    labels = [
        token if trained else -100 for token, trained in zip(sample.ids, sample.mask, strict=True)
    ]
    return {"input_ids": list(sample.ids), "labels": labels}
