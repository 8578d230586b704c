"""ScoreFlow: a designer learns to write workflow programs from how well its programs score (Wang
et al., arXiv:2502.04306).

A round is a step: `num_generations` programs are written for each of `tasks_per_step` tasks, every
valid one is run `num_runs` times, and its score is the mean (`program_scores.py`). All ordered
pairs of programs of a task go into one pool; `num_pairs` of them are drawn, with chances
proportional to (s_w - s_l)^alpha, and learnt from by Score-DPO (`preference_loss.py`) against the
base. The other runs of a program are children of the episode that wrote it: its designer's turns
given, everything else live. A round without a pair changes nothing and is warned of.

`objective` has the paper's controls on the same data: `dpo` (no weighing by scores), `sft`
(imitates the best program of each task), `grpo` (a program's score against those of its task;
executors that learn too are compared among the runs of one program).

Against the paper: LoRA on more than q and v if you say so; temperature 1 by default; two programs
of the same text are no pair; invalid programs are asked for again `system.attempts` times, not 500,
and then drop out (`invalid: zero` lets them be rejected); programs run in a sandbox. Which reward
trains and which is reported are two settings: `reward_weights` and the first of `rewards`.

accelerate launch recipes/scoreflow.py [--config recipes/scoreflow.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....agents.concurrency import gather
from ....agents.programs.restrictions import nodes, program_of
from ....agents.programs.workflow import Workflow
from ....agents.settings import parsed_mapping, setting
from ....agents.types import Reward, SettingError, from_json
from ....rollouts.episodes.runner import EpisodeRequest
from ....rollouts.rewards.builtin import workflow
from ....rollouts.rewards.scoring import RewardFn
from ....rollouts.types import Episode, TurnKey
from ...collection.derived_episodes import is_derived
from ...config import RunConfig
from ...credit.program_scores import (
    ScoredProgram,
    best_programs,
    drawn,
    ordered_pairs,
    preference,
    score_table,
)
from ...credit.rules import credit
from ...credit.weights import Advantages, CreditConfig, RewardWeights
from ...trainer import Trainer
from ...update.losses.inputs import LossInputs
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ...update.losses.statistics import Stats
from ...update.optimizer_step import UpdateResult
from ...update.policy_batch import policy_batch
from ..imitation.imitation import ImitationConfig, fit_turns
from .pair_learner import PairLearner, PairLearnerConfig

RUNS = "runs"  # of a program, after its first
OBJECTIVES, WEIGHTINGS = ("score_dpo", "dpo", "sft", "grpo"), ("both", "chosen", "rejected")


@dataclass
class GroupConfig(CreditConfig, LossConfig):
    """Settings of `objective: grpo`."""


@dataclass
class ScoreFlowConfig(RunConfig, RewardWeights, PairLearnerConfig):
    """`RunConfig` with runs of a program, pairs and how they are learnt from
    (`PairLearnerConfig`)."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/scoreflow"
    )
    objective: str = setting(
        "score_dpo, or on the same data dpo, sft (on each task's best program), grpo",
        "score_dpo",
        choices=OBJECTIVES,
    )
    num_runs: int = setting("runs of a program, whose mean is its score", 3, at_least=1)
    num_pairs: int = setting("pairs drawn in a round, with replacement", 600, at_least=1)
    alpha: float = setting(
        "a pair is drawn in proportion to its difference in score to this power; 0 draws all alike",
        3.0,
        at_least=0,
    )
    score_weighting: str = setting(
        "score_dpo: which sides are weighed by scores: both, chosen or rejected",
        "both",
        choices=WEIGHTINGS,
    )
    score_power: float = setting("score_dpo: weights are the scores to this power", 1.0, above=0)
    invalid: str = setting(
        "programs that cannot be run: drop, or zero (they take part with a score of 0)",
        "drop",
        choices=("drop", "zero"),
    )
    sft: dict | str | None = setting(
        "objective sft: num_train_epochs, train_batch_size", factory=dict
    )
    grpo: dict | str | None = setting(
        "objective grpo: fields of CreditConfig and LossConfig", factory=dict
    )

    def check(self) -> None:
        if self.mode != "joint":
            raise SettingError(f"mode: expected joint, got {self.mode!r}; programs have one author")
        if self.num_generations < 2 and not self.episodes:
            raise SettingError(
                f"num_generations: a pair needs two programs of a task; got {self.num_generations}"
            )
        if self.num_iterations != 1:
            raise SettingError(
                "num_iterations: preferences are weighed anew before every update; set"
                " num_train_epochs instead"
            )
        self.imitation = from_json(ImitationConfig, parsed_mapping("sft", self.sft), "sft")
        self.group = from_json(GroupConfig, parsed_mapping("grpo", self.grpo), "grpo")
        if self.imitation.trainer != "marlora":
            raise SettingError("sft.trainer: ScoreFlow imitates with its own trainer; leave it out")


class ScoreFlowTrainer(Trainer[ScoreFlowConfig]):
    """Trains a designer by the scores of its programs. The system is a `Workflow`. Arguments: see
    `Trainer`."""

    Config = ScoreFlowConfig

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        spec = self.spec
        if not isinstance(spec.system, Workflow):
            raise SettingError(
                "system: ScoreFlow trains the designer of a Workflow, got"
                f" {type(spec.system).__name__}"
            )
        self.system: Workflow = spec.system
        self.policy = next(
            agent.policy for agent in spec.system.specs if agent.name == self.system.designer
        )
        learning = [
            name
            for name, policy in spec.policies.items()
            if policy.trainable and policy.has_adapter
        ]
        if self.policy not in learning:
            raise SettingError(
                f"policies.{self.policy}: the designer's policy has to be trainable, with an"
                " adapter"
            )
        if self.args.objective == "grpo":
            self._check_sampling()
        elif idle := [name for name in learning if name != self.policy]:
            raise SettingError(
                f"policies.{idle[0]}: objective {self.args.objective} trains the designer alone;"
                " set trainable: false, let its agents speak as policy base, or take objective"
                " grpo"
            )
        self.learner = PairLearner(self.run.learner, self.args)

    def extra_rewards(self) -> Sequence[RewardFn]:
        return (workflow,)  # which programs are valid

    def collect(self, step: int) -> list[Episode]:
        """The round's programs, each with its first run, and the other runs of those that are
        valid."""
        rollouts = self.run.rollouts
        episodes = rollouts.collect(step)
        if self.args.episodes or self.args.num_runs == 1:
            return episodes
        written = [e for e in episodes if not is_derived(e, RUNS)]
        table, _ = self.table(written)
        valid = [row.episode for row in table if not row.fault]
        return [*written, *rollouts.derive(step, valid, RUNS, self.more)]

    async def more(self, episode: Episode) -> list[Episode]:
        """The other runs of an episode's program."""
        player = self.run.rollouts.player()
        given = [turn for turn in episode.turns if turn.agent == self.system.designer]
        again = [
            EpisodeRequest(episode.task, f"{episode.id}/{RUNS}/all", k, episode.step)
            for k in range(1, self.args.num_runs)
        ]
        return await gather(player.play(job, given=given) for job in again)

    def table(self, episodes: Sequence[Episode]) -> tuple[list[ScoredProgram], Counter[str]]:
        """The scored programs of the episodes, and how many have no score, by reason."""
        return score_table(episodes, self.system.designer, self.args.num_runs, self.args, RUNS)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Score the programs, learn from them; returns metrics."""
        table, without = self.table(episodes)
        row = {"programs": len(table), **self.describe(table), "without_score": dict(without)}
        method = {"sft": self.imitate_best, "grpo": self.compare}.get(
            self.args.objective, self.prefer
        )
        updates, numbers = method(step, table)
        return {"policies": self.rows(updates, episodes), "scoreflow": {**row, **numbers}}

    def describe(self, table: Sequence[ScoredProgram]) -> dict[str, Any]:
        """What the round's programs are: `score` is the mean over all, invalid ones count 0."""
        valid = [row for row in table if not row.fault]
        best: dict[str, float] = {}
        for row in table:
            best[row.episode.task.id] = max(row.score, best.get(row.episode.task.id, 0.0))
        programs = [program_of(row.turn.text, self.system.tag) or "" for row in valid]
        return {
            "score": _mean(row.score for row in table),
            "score_of_valid": _mean(row.score for row in valid),
            "best": _mean(best.values()),
            "valid": len(valid) / max(len(table), 1),
            "faults": dict(Counter(row.fault.partition(":")[0] for row in table if row.fault)),
            "nodes": _mean(nodes(program, self.system.callable) for program in programs),
            "distinct": len(set(programs)) / max(len(programs), 1),
        }

    def prefer(
        self, step: int, table: Sequence[ScoredProgram]
    ) -> tuple[dict[str, UpdateResult], dict[str, Any]]:
        """Score-DPO or DPO on drawn pairs."""
        args = self.args
        pool = ordered_pairs(table, args.invalid == "zero")
        weighting = args.score_weighting if args.objective == "score_dpo" else "none"
        pairs = [
            preference(*pair, weighting, args.score_power)
            for pair in drawn(pool, args.num_pairs, args.alpha, args.seed + step)
        ]
        learnt = self.learner.learn(step, pairs)
        return learnt.updates, {"pool": len(pool), **learnt.metrics}

    def imitate_best(
        self, step: int, table: Sequence[ScoredProgram]
    ) -> tuple[dict[str, UpdateResult], dict[str, Any]]:
        """SFT on the best program of each task."""
        best = best_programs(table)
        if not best:
            self.run.log.warn(f"step {step}: no program scored above 0; nothing to learn from")
            return {}, {"kept": 0}
        weights = {(row.episode.id, row.turn.index, row.turn.sibling): 1.0 for row in best}
        done = fit_turns(
            self.run.learner, step, [row.as_lesson for row in best], weights, self.args.imitation
        )
        return done.updates, {"kept": len(best), "nll_before": done.before, "nll_after": done.after}

    def compare(
        self, step: int, table: Sequence[ScoredProgram]
    ) -> tuple[dict[str, UpdateResult], dict[str, Any]]:
        """GRPO: programs against those of their task; executors' turns against the other runs of
        their program."""
        learner, group = self.run.learner, self.args.group
        rows = [row for row in table if self.args.invalid == "zero" or not row.fault]
        designs = [
            dataclasses.replace(row.as_lesson, rewards=(Reward("score", row.score),))
            for row in rows
        ]
        in_constant_groups: set[TurnKey] = set()
        advantages: Advantages = credit(
            designs,
            dataclasses.replace(group, reward_weights={}),
            learner.credit_state,
            in_constant_groups,
        )
        played = [
            dataclasses.replace(
                e,
                group=row.episode.id,
                turns=tuple(t for t in e.turns if t.agent != self.system.designer),
            )
            for row in rows
            for e in row.runs
        ]
        if len(learner.policy_of) > 1:
            advantages |= credit(
                played,
                dataclasses.replace(group, reward_weights=self.args.reward_weights),
                learner.credit_state,
                in_constant_groups,
            )
        found, dropped, how = policy_batch(
            [*designs, *played], advantages, in_constant_groups, learner.policy_of, group
        )
        if step == 1 and found:
            learner.show(found)
        if not any(advantages.values()):
            learner.log.warn(
                f"step {step}: no two programs of a task differ in score; nothing to learn from"
            )
        done = learner.learn(step, found, self.group_loss, how)
        return done, {
            "trained": len(found),
            "dropped": {f"{agent}: {why}": n for (agent, why), n in sorted(dropped.items())},
        }

    def group_loss(self, inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
        """The policy loss of `objective: grpo`, and its statistics."""
        return policy_loss(inputs, self.args.group)


def _mean(values: Any) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
