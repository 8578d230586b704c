"""Prompts and weights from one store: the episodes that train the adapters by GRPO also rank the
prompts that they were played under.

A step plays each of its tasks `num_generations` times, split evenly over the candidates in play: a
candidate is a prompt for every agent in `modules`, and the first one in play is the one in force.
The same episodes are used twice.

- Weights: an episode's advantage compares it with the others of its task and its candidate alone,
  so that no token is praised for the prompt it was sampled under; its ratios are taken on the
  turn's own prompt tokens, those of the candidate that it was sampled under. Every candidate's
  episodes train the same adapters. A step costs the same number of episodes however many
  candidates are in play, and one candidate is plain GRPO.
- Prompts: all candidates in play meet the same tasks, with equal random numbers, so their mean
  rewards over the tasks of a round (`round_steps` steps) are compared pairwise by task.

A round ends with the first step, every `round_steps` steps after it, and with the last step. If
another candidate then has a higher mean reward than the one in force, both are measured on the
validation tasks, and it is put in force if it passes the gate. Then the helper `proposer` is shown
episodes of the best and the worst candidate (`rollout_proposer.py`) and writes new prompts, each
for an agent drawn at random, or by the blame of a credit rule (`agent_choice.py`); a new candidate
takes the place of the worst of those in play, never of the one in force. Rewards of a round that is
over count no longer, since the adapters have moved. The run ends with the prompts in force and the
adapters.

The nearest published method, BetterTogether (arXiv:2407.10930), spends separate episodes on
prompts and on weights, in turn; GRPO is that of `policy_gradient/grpo.py`.

accelerate launch recipes/prompts_and_weights.py [--config recipes/prompts_and_weights.yaml]
    [--num_candidates 1] [--field value]
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch

from ....agents.settings import setting
from ....agents.state import Param, TeamState
from ....agents.types import SettingError, nearest
from ....rollouts.evaluation.statistics import Evaluation, paired
from ....rollouts.types import Episode
from ...config import RunConfig
from ...credit.weights import CreditConfig, RewardWeights, team_rewards
from ...feedback.gates import Scorer
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...update.losses.inputs import LossInputs
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ...update.losses.statistics import Stats
from ...values.acceptance import GATES, Verdict, always
from ...values.memory import Memory
from ...values.parts import Part
from ...values.search import Candidate, Duplicate, Search
from ..policy_gradient.grpo import policy_gradient
from .agent_choice import AgentChoice, AgentChoiceConfig
from .rollout_proposer import RolloutProposer, RolloutProposerConfig, Shown
from .search.mipro_proposer import PROPOSER

Rewards = Mapping[str, Mapping[str, Sequence[float]]]  # by candidate, by task


@dataclass
class PromptsAndWeightsConfig(
    RunConfig, CreditConfig, LossConfig, RolloutProposerConfig, AgentChoiceConfig
):
    """`RunConfig` with a credit rule (`CreditConfig`), a policy-gradient loss (`LossConfig`), a
    proposer (`RolloutProposerConfig`) and whose prompt it is asked for (`AgentChoiceConfig`)."""

    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/prompts_and_weights"
    )
    modules: list[str] = setting("agents whose prompts are searched; empty: all", factory=list)
    num_candidates: int = setting(
        "prompt candidates in play at most, the one in force included; 1 trains weights alone",
        2,
        at_least=1,
    )
    round_steps: int = setting(
        "steps between comparisons of the candidates in play; the first comes with step 1",
        5,
        at_least=1,
    )
    gate: str = setting(
        "when the best candidate of a round replaces the prompts in force: not_worse or"
        " strictly_better on the validation tasks, or always",
        "not_worse",
        choices=("not_worse", "strictly_better", "always"),
    )
    num_generations: int = setting(
        "episodes per task, split evenly over the candidates in play; credit compares those of one"
        " candidate",
        8,
        at_least=1,
    )
    credit: str = setting(
        "rule that compares episodes of one task and candidate: grpo, rloo, dr_grpo or dr_mas",
        "grpo",
        choices=("grpo", "rloo", "dr_grpo", "dr_mas"),
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, on which the gate compares prompts", 50, at_least=0
    )

    def check(self) -> None:
        if self.num_generations < 2 * self.num_candidates:
            raise SettingError(
                f"num_generations: {self.num_generations} episodes per task over"
                f" {self.num_candidates} candidates leave fewer than 2 of a candidate to compare;"
                f" set it to at least {2 * self.num_candidates}, or num_candidates lower"
            )
        if self.num_candidates > 1 and self.gate != "always" and not self.num_val_tasks:
            raise SettingError(
                f"num_val_tasks: the gate {self.gate!r} compares prompts on validation tasks; set"
                " it above 0, or gate to always"
            )


class PromptsAndWeightsTrainer(Trainer[PromptsAndWeightsConfig]):
    """Trains a team's adapters and searches its prompts in the same episodes. Arguments: see
    `Trainer`.

    trainer = PromptsAndWeightsTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]), tasks="gsm8k",
        args=PromptsAndWeightsConfig(helpers={"proposer": {}}),
    )
    trainer.train()
    """

    Config = PromptsAndWeightsConfig
    ratios = True

    def parts(self) -> Sequence[Part]:
        args = self.args
        names = [agent.name for agent in self.spec.system.specs]
        for name in args.modules:
            if name not in names:
                raise SettingError(f"modules: no agent {name!r}; {nearest(name, names)}")
        params = {param.name: param for param in self.spec.system.params()}
        self.prompts: list[Param] = [params[f"{name}.prompt"] for name in args.modules or names]
        self.proposer = RolloutProposer(self.run.rollouts, self.spec, args)
        self.choice = AgentChoice(self.run.rollouts, args, args)
        if args.num_candidates > 1:
            self.spec.helper(PROPOSER)
        # scores are those of the last gate, on validation tasks
        self.search = Search("candidates", args.seed)
        # `in_play` (ids, the one in force first), `rewards` of the round, `asked`, `dropped`
        self.memory = Memory("prompts_and_weights")
        return [self.search, self.memory]

    # what is played

    def step(self, step: int) -> StepResult:
        """Play the candidates in play; at the end of a round compare them and ask for others; one
        update of the adapters."""
        if step == 1:
            root = self.search.add(Candidate(self.values_in(self.run.state), proposer="start"))
            self.search.adopt(root.id, "the team as it began")
            self.memory["in_play"], self.memory["rewards"] = [root.id], {}
        episodes = self.collect(step)
        if step == 1:
            self._check_weights(episodes)
        found = rewards_by_task(episodes, self.candidate_of, self.args)
        self.memory["rewards"] = merged(self.memory["rewards"], found)
        row: dict[str, Any] = {"reward": {id: r.accuracy for id, r in standings(found).items()}}
        state = None
        if step == self.args.max_steps or (step - 1) % self.args.round_steps == 0:
            state = self.end_round(step, episodes, row)
        return StepResult({**self.learn(step, episodes), "prompts": row}, episodes, state)

    def collect(self, step: int) -> list[Episode]:
        """The step's tasks, played under every candidate in play."""
        rollouts, start = self.run.rollouts, time.perf_counter()
        in_play: list[str] = self.memory["in_play"]
        tasks = rollouts.tasks_of(step)
        episodes: list[Episode] = []
        for id, n in zip(in_play, shares(self.args.num_generations, len(in_play)), strict=True):
            state = self.state_of(self.search[id])
            # equal draws for all candidates, others at every step
            episodes += rollouts.play(tasks, state, n=n, kind="train", draws=f"step-{step}")
        seconds = time.perf_counter() - start
        self.run.log.collected(step, episodes, rollouts.metric, seconds, {})
        return episodes

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One update from all candidates' episodes; returns metrics."""
        return policy_gradient(self, step, episodes, self.loss)

    def loss(self, inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
        """The policy-gradient loss that every policy's update minimises."""
        return policy_loss(inputs, self.args)

    # candidates and states

    def values_in(self, state: TeamState) -> dict[str, str]:
        """The prompts under search in a state."""
        return {param.name: state.values.get(param.name, param.value) for param in self.prompts}

    def state_of(self, candidate: Candidate) -> TeamState:
        """The state in force, with a candidate's prompts."""
        return self._scorer().with_values(candidate.values)

    def candidate_of(self, episode: Episode) -> str:
        """Id of the candidate that an episode was played under, by the state that it names. Raises
        `ValueError` if there is none."""
        candidate = self.search.find(self.values_in(episode.state))
        if candidate is None:
            raise ValueError(f"episode {episode.id}: played under prompts of no candidate")
        return candidate.id

    def _scorer(self) -> Scorer:
        own = {param.name: param.value for param in self.prompts}
        return Scorer(self.run.evaluator, self.run.state, self.spec.val_tasks, own)

    # the end of a round

    def end_round(
        self, step: int, episodes: Sequence[Episode], row: dict[str, Any]
    ) -> TeamState | None:
        """Compare the candidates in play, put a better one in force, and take in new ones, unless
        nothing more is played. Returns the state that is in force from now on, None as it is;
        `row` gets the numbers."""
        ranked = standings(self.memory["rewards"])
        old = self.search[self.memory["in_play"][0]]
        row["round"] = {
            id: {**result.summary(), "paired": paired(ranked[old.id], result)}
            for id, result in ranked.items()
        }
        new = self.search[next(iter(ranked))]
        adopted = new.id != old.id and self._passes(new, old, row)
        in_force = new if adopted else old
        others = [id for id in ranked if id != in_force.id]  # the best first
        self.memory["in_play"] = [in_force.id, *others]
        if step < self.args.max_steps and self.args.num_candidates > 1:
            self._take_in(step, ranked, episodes, row)
        self.memory["rewards"] = {}
        return self.state_of(in_force) if adopted else None

    def _passes(self, new: Candidate, old: Candidate, row: dict[str, Any]) -> bool:
        """Whether the gate lets a candidate replace the one in force."""
        verdict = self._judged(new, old)
        (self.search.adopt if verdict else self.search.reject)(new.id, verdict)
        row["gate"] = {"candidate": new.id, "passed": bool(verdict), "why": str(verdict)}
        self.run.log.say(f"prompts: candidate {new.id} against {old.id}: {verdict}")
        return bool(verdict)

    def _judged(self, new: Candidate, old: Candidate) -> Verdict:
        """Both measured with the adapters that played the step: what an earlier gate measured was
        measured with others."""
        gate, tasks, measure = GATES[self.args.gate], self.spec.val_tasks, self._measured
        if gate is always:
            return gate(new, old, None)
        bound = measure(old, None).accuracy
        strict = self.args.gate == "strictly_better"
        result = measure(new, bound if strict else math.nextafter(bound, -math.inf))
        if result.left:
            played = f"{len(result.scores)} of {len(tasks)} tasks"
            return Verdict(False, f"stopped after {played}: {bound:.4f} is out of reach")
        return gate(self.search[new.id], self.search[old.id], [task.id for task in tasks])

    def _measured(self, candidate: Candidate, above: float | None) -> Evaluation:
        result = self.run.evaluator.measure(
            self.state_of(candidate), self.spec.val_tasks, above=above
        )
        self.search.score(candidate.id, result.scores)
        return result

    def _take_in(
        self,
        step: int,
        ranked: Mapping[str, Evaluation],
        episodes: Sequence[Episode],
        row: dict[str, Any],
    ) -> None:
        """Ask for candidates: as many as there is room for, at least one, which replaces the worst
        in play. What cannot be tried is dropped and counted."""
        memory, most = self.memory, self.args.num_candidates
        in_force = self.search[memory["in_play"][0]]
        count = max(most - len(memory["in_play"]), 1)
        own = [e for e in episodes if self.candidate_of(e) == in_force.id]
        chosen = self.choice.choose(self.prompts, count, own, self.search.rng())
        params = [self._prompt_of(agent, in_force) for agent in chosen.agents]
        ids = list(ranked)
        shown = [self._shown(id, ranked[id], episodes) for id in dict.fromkeys((ids[0], ids[-1]))]
        found = self.proposer.propose(params, shown)
        fresh = []
        for param in {param.name: param for param in params}.values():
            for text in found.texts[param.agent]:
                made = Candidate(
                    {**in_force.values, param.name: text},
                    proposer=PROPOSER,
                    parents=(in_force.id,),
                    round=step,
                )
                try:
                    fresh.append(self.search.add(made).id)
                except Duplicate:
                    found.dropped["tried before"] += 1
        memory["asked"] = memory.get("asked", 0) + found.asked
        memory["dropped"] = dict(Counter(memory.get("dropped", {})) + found.dropped)
        memory["in_play"] = [*memory["in_play"][: most - len(fresh)], *fresh]
        row["proposals"] = {
            "new": fresh,
            "dropped": dict(found.dropped),
            "agents": list(chosen.agents),
            "blame": dict(chosen.blame),
        }
        if not fresh:
            self.run.log.warn(
                f"step {step}: none of {found.asked} proposals of helpers.{PROPOSER} can be tried"
                f" ({dict(found.dropped)}); the candidates in play stay"
            )

    def _prompt_of(self, agent: str, candidate: Candidate) -> Param:
        (param,) = (param for param in self.prompts if param.agent == agent)
        return dataclasses.replace(param, value=candidate.values[param.name])

    def _shown(self, id: str, result: Evaluation, episodes: Sequence[Episode]) -> Shown:
        """A candidate of the round, with its episodes of the last step that have a reward."""
        rewards = team_rewards(episodes, self.args)
        own = [e for e in episodes if self.candidate_of(e) == id and not math.isnan(rewards[e.id])]
        return Shown(self.search[id].values, result.accuracy, own, rewards)

    def report(self) -> dict[str, Any]:
        """Also `candidates`, the archive in order, with the one in force, and `proposals`."""
        current = self.search.current
        rows = [
            {
                "id": each.id,
                "values": dict(each.values),
                "parents": list(each.parents),
                "step": each.round,
                "verdict": each.verdict,
                "in_force": current is not None and each.id == current.id,
            }
            for each in self.search.candidates
        ]
        asked, dropped = self.memory.get("asked", 0), self.memory.get("dropped", {})
        proposals = {"asked": asked, "dropped": dropped}
        return {**super().report(), "candidates": rows, "proposals": proposals}


# which episodes rank what


def shares(count: int, candidates: int) -> list[int]:
    """`count` episodes split over candidates as evenly as can be, the first ones get one more."""
    each, more = divmod(count, candidates)
    return [each + (number < more) for number in range(candidates)]


def rewards_by_task(
    episodes: Sequence[Episode], candidate_of: Callable[[Episode], str], weights: RewardWeights
) -> dict[str, dict[str, list[float]]]:
    """The team's rewards by candidate and task, as credit weighs them. An episode that failed or
    could not be scored counts 0, as in an evaluation: prompts are to blame for it too."""
    rewards = team_rewards(episodes, weights)
    found: dict[str, dict[str, list[float]]] = {}
    for episode in episodes:
        reward = rewards[episode.id]
        by_task = found.setdefault(candidate_of(episode), {})
        by_task.setdefault(episode.task.id, []).append(0.0 if math.isnan(reward) else reward)
    return found


def merged(one: Rewards, other: Rewards) -> dict[str, dict[str, list[float]]]:
    """All rewards of both, by candidate and task."""
    return {
        id: {
            task: [*one.get(id, {}).get(task, ()), *other.get(id, {}).get(task, ())]
            for task in dict.fromkeys([*one.get(id, {}), *other.get(id, {})])
        }
        for id in dict.fromkeys([*one, *other])
    }


def standings(rewards: Rewards) -> dict[str, Evaluation]:
    """Every candidate's mean reward by task, the highest mean over the tasks first, of equal ones
    the earlier first."""
    means = {
        id: Evaluation({task: fmean(own) for task, own in by_task.items()})
        for id, by_task in rewards.items()
    }
    return dict(sorted(means.items(), key=lambda pair: -pair[1].accuracy))
