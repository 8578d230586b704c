"""Preferences between whole runs of a team: SysDPO (arXiv:2502.17721), and DPO per agent
(arXiv:2305.18290) as its control.

One step takes the episodes of `tasks_per_step` tasks (played, or from `episodes: FOLDER`), pairs
those of a task whose scores differ (`credit/pairs.py`), and moves every trainable adapter so that
the chosen run as a whole gains on the rejected one against the reference (`preference_loss.py`).
Only scalars couple the agents: turns are scored by forward passes first, then each adapter learns
from its own turns, each with the number that `margin_gradient` gave it. Against the paper: LoRA,
with the adapters off (or as the run began with them) as reference; a score difference makes the
pairs. Frozen and outside agents may stand in the team; they count 0.

accelerate launch recipes/sysdpo.py [--config recipes/sysdpo.yaml] [--field value]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.evaluation.accuracy import best, evaluation
from ....rollouts.types import Episode
from ...config import RunConfig
from ...credit.pairs import Pair, PairConfig, agent_pairs, pairs_of
from ...trainer import Trainer
from ..trl_control import Row, TrainerChoice, TRLExample, learn_with_trl
from .components import Component
from .drafts import with_drafts
from .pair_learner import PairLearner, PairLearnerConfig


@dataclass
class PreferenceConfig(RunConfig, PairConfig, PairLearnerConfig, TrainerChoice):
    """`RunConfig` with pairs (`PairConfig`) and how they are learnt from (`PairLearnerConfig`).

    What learns is said by the policies: `policies: {critic: {trainable: false}}` trains all but the
    critic.
    """

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/sysdpo"
    )
    num_drafts: int = setting(
        "sampling: drafts played for every task of a step; equal ones count once", 4, at_least=1
    )
    best_of: int = setting(
        "also report what the untrained team reaches if the best of this many episodes counts; 0"
        " does not",
        0,
        at_least=0,
    )

    def check(self) -> None:
        if self.mode == "sampling" and (self.train_batch_size or self.num_train_epochs > 1):
            raise SettingError(
                "mode sampling: drafts are drawn anew for every update, so train_batch_size 0 and"
                " num_train_epochs 1 expected"
            )
        if self.num_iterations != 1:
            raise SettingError(
                "num_iterations: preferences are weighed anew before every update; set"
                " num_train_epochs instead"
            )
        if self.trainer == "trl":
            self._check_trl()
        if self.num_generations < 2 and not self.episodes:
            raise SettingError(
                f"num_generations: a pair needs two episodes of a task; got {self.num_generations}"
            )

    def _check_trl(self) -> None:
        if self.mode != "independent":
            raise SettingError(
                "trainer trl: TRL knows single agents, so mode independent expected, got"
                f" {self.mode!r}"
            )
        if self.reference != "step" and self.max_steps > 1:
            raise SettingError(
                "trainer trl: TRL's reference is the adapter as a step begins; set reference step,"
                " or max_steps 1"
            )
        if self.label_smoothing and self.loss_type != "robust":
            raise SettingError(
                "label_smoothing: TRL's DPO ignores it for every loss but robust; set loss_type"
                f" robust, label_smoothing 0 or trainer marlora; got {self.label_smoothing} with"
                f" {self.loss_type}"
            )
        if self.length_normalised != (self.loss_type == "ipo"):
            raise SettingError(
                "trainer trl: TRL divides by length for ipo and for no other loss; set"
                " length_normalised so"
            )


class PreferenceTrainer(Trainer[PreferenceConfig]):
    """Trains a team by preferences between its runs. Arguments: see `Trainer`.

    Args:
        components: other parts of the system that learn in the same sum (`components.py`).
    """

    Config = PreferenceConfig

    def __init__(self, *args: Any, components: Sequence[Component] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        outside = [
            agent.name for agent in self.spec.system.specs if self.spec.policies[agent.policy].url
        ]
        if self.args.mode == "sampling" and outside:
            raise SettingError(
                f"mode sampling: agent {outside[0]!r} is an outside model, whose probability of a"
                " draft or an output nobody knows; use joint"
            )
        self.learner = PairLearner(self.run.learner, self.args, components)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Pair the episodes, learn from the pairs; returns metrics."""
        pairs = pairs_of(episodes, self.args, self.args.seed + step)
        if self.args.trainer == "trl":
            return self.learn_with_trl(step, pairs, episodes)
        drafted = (
            with_drafts(self.run.rollouts, step, pairs, self.args.num_drafts)
            if self.args.mode == "sampling"
            else pairs
        )
        learnt = self.learner.learn(step, drafted)
        metrics = {**learnt.metrics, "without_drafts": len(pairs) - len(drafted)}
        return {
            "policies": self.rows(learnt.updates, episodes),
            "dropped": _counted(learnt.dropped),
            "preference": metrics,
        }

    def learn_with_trl(
        self, step: int, pairs: Sequence[Pair], episodes: Sequence[Episode]
    ) -> dict[str, Any]:
        """The step by TRL's DPOTrainer, on the pairs of replies to one prompt (`agent_pairs`), one
        policy after the other."""
        lessons, dropped = {}, Counter[tuple[str, str]]()
        policy_of = self.run.learner.policy_of
        for policy in sorted(set(policy_of.values())):
            agents = [agent for agent, spoken in policy_of.items() if spoken == policy]
            rows, without = agent_pairs(pairs, agents)
            lessons[policy] = TRLExample(
                rows, sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
            )
            dropped += without
        done = learn_with_trl(self.run.learner, step, lessons, self.dpo_trainer)
        return {
            "policies": self.rows(done, episodes),
            "dropped": _counted(dropped),
            "preference": {
                "pairs": len(pairs),
                "rows": {policy: len(lesson.rows) for policy, lesson in lessons.items()},
            },
        }

    def dpo_trainer(
        self, model: Any, tokenizer: Any, rows: Sequence[Row], shared: Mapping[str, Any]
    ) -> Any:
        """A `DPOTrainer` with this run's settings."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Exact(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                # it would tokenise the texts again; the columns hold the tokens that were sampled
                return dataset

        args = DPOConfig(
            **shared,
            beta=self.args.beta,
            loss_type=[self.args.loss_type],
            label_smoothing=self.args.label_smoothing,
            per_device_train_batch_size=self.args.train_batch_size or len(rows),
            num_train_epochs=self.args.num_train_epochs,
        )
        return Exact(
            model,
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
        )

    def report(self) -> dict[str, Any]:
        """Besides the adapters' shares: best-of-n without training, the team as it was, its best
        episode picked by the reward itself."""
        if not self.args.best_of:
            return super().report()
        tasks, metric, count = self.spec.eval_tasks, self.spec.metric, self.args.best_of
        episodes = self.run.rollouts.play(
            tasks, self.run.origin, n=count, kind="eval", label=f"best-of-{count}"
        )
        result = evaluation(tasks, best(episodes, metric), metric)
        return {**super().report(), "best_of": {"n": count, **result.summary()}}


def _counted(dropped: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {f"{agent}: {reason}": count for (agent, reason), count in sorted(dropped.items())}
