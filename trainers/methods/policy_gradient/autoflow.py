"""AutoFlow: a designer learns to write one workflow in words for all tasks of a kind, by policy
gradient on its adapter, or is asked for better ones in a chat.

Li et al., arXiv:2407.12821, on the system `agents/programs/step_workflow.py`. A step samples
`num_generations` workflows from the designer, who sees the format, a description of the tasks and
an example, but no task. Each is followed by the interpreter on the step's training tasks at
temperature 0; its reward R is the mean of the run's first reward there, or `invalid_reward` if the
text is no workflow. The designer's adapter climbs (R - b) grad log pi(workflow | prompt), where the
baseline b is the mean of the step's workflows (`credit: dr_grpo`; rloo: of the others), a running
mean (rae) or none (team). The step's best workflow is then measured on the validation tasks, and is
in force from there on if it is strictly better than the one before. With `in_context: true` no
weight is trained: the helper `designer` is asked for one workflow a step, in a chat that holds the
earlier ones with their scores on one set of training tasks, or what is wrong with them.

Against the authors' code: there the test score of a new best takes the place of its training reward
before the update; here held-out tasks are played before and after, and no reward comes of them.
What is trained is what was followed: a text is parsed as it stands, by rules, and never mended by a
second model that gets the reward for it. Updates compare a group or use a running mean, where
theirs is PPO with a value head on a batch of one. Sampling is from the whole distribution (theirs:
top_p 0.9, top_k 40), since the gradient is not defined for a part of it. The workflow that is kept
is chosen on validation tasks, theirs by the training reward.

accelerate launch recipes/autoflow.py [--config recipes/autoflow.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....agents.programs.step_workflow import WORKFLOW, StepWorkflow
from ....agents.settings import setting
from ....agents.state import TeamState
from ....agents.types import AgentSpec, Message, Reward, Sampling, SettingError, Task
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.report.sections import stored, table_section
from ....rollouts.rewards.builtin import workflow as reported
from ....rollouts.types import Episode, Kind
from ...config import RunConfig
from ...credit.weights import CreditConfig
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ...values.acceptance import strictly_better
from ...values.memory import Memory
from ...values.parts import Part
from ...values.search import Candidate, Search
from .grpo import check_group_size, policy_gradient
from .workflow_designs import ScoredWorkflow, WorkflowDesign, design_statistics, mean

DESIGNER = "designer"  # the helper of the search in a chat
SCORED = "The workflow scores {score:.4f} on tasks of this kind. Write a better one."
REFUSED = "The workflow cannot be followed: {fault}. Write another one."


@dataclass
class AutoFlowConfig(RunConfig, CreditConfig, LossConfig):
    """`RunConfig` with a credit rule (`CreditConfig`) and a policy-gradient loss (`LossConfig`) for
    the designer's texts."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/autoflow"
    )
    in_context: bool = setting(
        "train no weights: ask the helper `designer` for one workflow a step, in a chat with the"
        " earlier ones and their scores; num_generations, credit and loss are then not read",
        False,
    )
    history: int = setting(
        "in_context: earlier workflows in the chat, the last ones", 10, at_least=1
    )
    max_workflow_length: int = setting(
        "in_context: tokens of the helper's reply, unless its sampling says otherwise",
        1024,
        at_least=1,
    )
    num_generations: int = setting("workflows sampled in a step", 8, at_least=1)
    tasks_per_step: int = setting(
        "training tasks on which every workflow of a step is scored", 16, at_least=1
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which the workflow in force is chosen", 50, at_least=1
    )
    invalid_reward: float = setting("reward of a text that is no workflow", -2.0)
    credit: str = setting(
        "rule: dr_grpo (reward minus the group's mean), rloo (minus the others' mean), grpo, rae"
        " (minus a running mean) or team (no baseline)",
        "dr_grpo",
        choices=("dr_grpo", "rloo", "grpo", "rae", "team"),
    )

    def check(self) -> None:
        for name in ("max_staleness", "episodes"):
            if getattr(self, name):
                raise SettingError(
                    f"{name}: workflows are sampled by the present designer and scored at once;"
                    " leave it out"
                )
        if self.reward_weights:
            raise SettingError(
                "reward_weights: a workflow is worth the mean of the first of `rewards`; leave it"
                " out"
            )
        if not self.in_context:
            check_group_size(self.num_generations, self.credit)


class AutoFlowTrainer(Trainer[AutoFlowConfig]):
    """Trains the designer of a `StepWorkflow`, or asks one. Arguments: see `Trainer`.

    team = StepWorkflow(["designer", AgentSpec("interpreter", policy="base")], designer="designer",
                        description="sums of fractions")
    trainer = AutoFlowTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=team, tasks="gsm8k")
    trainer.train()
    """

    Config = AutoFlowConfig
    ratios = True

    def parts(self) -> Sequence[Part]:
        system = self.spec.system
        if not isinstance(system, StepWorkflow):
            raise SettingError(
                "system.class: AutoFlow writes workflows for a"
                " marlora.agents.programs.step_workflow:StepWorkflow, got"
                f" {type(system).__name__}"
            )
        self.target: StepWorkflow = system
        self.reader = system.without_designer()  # its answers depend on no designer's adapter
        # what the team begins with is a designer's example
        self.example = str(self.spec.values.get(WORKFLOW, system.workflow))
        self._check_policies()
        self.search = Search("workflows", self.args.seed)
        self.chat = Memory("chat")
        return [self.search, self.chat] if self.args.in_context else [self.search]

    def _check_policies(self) -> None:
        """The designer learns and nobody else, or nobody does and a helper is asked."""
        name, spec = self.target.designer, self.spec
        if self.args.in_context:
            spec.helper(DESIGNER)
            if name:
                raise SettingError(
                    "system.designer: with in_context the helper `designer` writes; leave it out"
                )
        elif not name:
            raise SettingError("system.designer: missing; it names the agent that learns to write")
        own = next((a.policy for a in self.target.specs if a.name == name), None)
        learning = [n for n, p in spec.policies.items() if p.trainable and p.has_adapter]
        if own is not None and own not in learning:
            raise SettingError(
                f"policies.{own}: the designer's policy has to be trainable, with an adapter"
            )
        readers = {agent.policy for agent in self.reader.specs}
        for policy in learning:
            if policy != own or policy in readers:
                raise SettingError(
                    f"policies.{policy}: the interpreter is not trained; let its agent speak as"
                    " policy base, or set trainable: false"
                )

    # a step

    def step(self, step: int) -> StepResult:
        """Write workflows, score them, learn from the scores, keep the best."""
        start = time.perf_counter()
        if step == 1:
            self._begin()
        tasks = self.spec.tasks_of(1 if self.args.in_context else step)
        designs = [self._asked(step, tasks)] if self.args.in_context else self._sampled(step)
        written = self._scored(designs, tasks)
        self._choose(step, written)
        row = self._row(written)
        current = self._current()
        self.run.log.say(
            f"step {step}: {row['valid']:.0%} valid, reward {row['reward']}; in force {current.id}:"
            f" {current.mean:.4f}"
        )
        metrics = {"autoflow": row}
        if self.args.in_context:
            self._remember(written[0])
            metrics |= {"policies": self.rows({}, ())}
        else:
            metrics |= self._learn(step, written, time.perf_counter() - start)
        learnt = () if self.args.in_context else designs
        return StepResult(metrics, learnt, state=self.run.state.with_values(current.values))

    def _begin(self) -> None:
        """Measure the workflow that the team begins with."""
        values = {WORKFLOW: self.example}
        first = self.search.add(Candidate(values, "start", "the workflow to begin with"))
        self.search.score(first.id, self._scores(self.example, self.spec.val_tasks))
        self.search.adopt(first.id, "what the team begins with")

    def _current(self) -> Candidate:
        current = self.search.current
        assert current is not None, "the first step adopts what the team begins with"
        return current

    def _sampled(self, step: int) -> list[Episode]:
        """The step's workflows, sampled by the designer."""
        return self._designs(f"workflow-{step:06d}", None, "train")

    def _designs(
        self, name: str, state: TeamState | None, kind: Kind, label: str = ""
    ) -> list[Episode]:
        """A group of replies of the designer, each with its reward `valid`."""
        agents = [spec for spec in self.target.specs if spec.name == self.target.designer]
        return self.run.rollouts.play(
            [Task(name, self.target.design_prompt(self.example))],
            state,
            n=self.args.num_generations,
            kind=kind,
            system=WorkflowDesign(agents, target=self.target),
            rewards=(reported,),
            label=label,
        )

    def _scored(self, designs: Sequence[Episode], tasks: Sequence[Task]) -> list[ScoredWorkflow]:
        """The workflows of these replies with their rewards; equal ones are followed once."""
        known: dict[str, float] = {}
        found = []
        for episode in designs:
            if episode.error is not None or episode.output is None:
                fault = f"episode: {episode.error or 'no reply'}"
                found.append(ScoredWorkflow(episode, "", fault, math.nan))
                continue
            text, fault = self.target.read(episode.output)
            if text and text not in known:
                scores = self._scores(text, tasks)
                known[text] = math.fsum(scores.values()) / len(scores)
            reward = self.args.invalid_reward if fault else known[text]
            found.append(ScoredWorkflow(episode, text, fault, reward))
        return found

    def _scores(
        self, workflow: str, tasks: Sequence[Task], kind: Kind = "trial"
    ) -> Mapping[str, float]:
        """What a workflow scores on each of these tasks, at temperature 0."""
        state = self.run.state.with_values({WORKFLOW: workflow})
        episodes = self.run.rollouts.play(tasks, state, greedy=True, kind=kind, system=self.reader)
        return evaluation(tasks, episodes, self.spec.metric).scores

    def _choose(self, step: int, written: Sequence[ScoredWorkflow]) -> None:
        """Put the step's best workflow, the first of equals, in force if it is better on the
        validation tasks than the one that is."""
        valid = [each for each in written if each.text]
        if not valid:
            return
        best = max(valid, key=lambda each: each.reward)
        values = {WORKFLOW: best.text}
        if self.search.find(values) is not None:
            return
        note = f"training reward {best.reward:.4f}"
        new = self.search.add(Candidate(values, DESIGNER, note, round=step))
        new = self.search.score(new.id, self._scores(best.text, self.spec.val_tasks))
        verdict = strictly_better(new, self._current())
        if verdict:
            self.search.adopt(new.id, verdict)
        else:
            self.search.reject(new.id, verdict)

    def _row(self, written: Sequence[ScoredWorkflow]) -> dict[str, Any]:
        """The step's workflows in numbers, and the one in force with its score on validation
        tasks."""
        current = self._current()
        row = design_statistics(written)
        return {**row, "in_force": current.id, "in_force_score": current.mean}

    # learning

    def _learn(
        self, step: int, written: Sequence[ScoredWorkflow], seconds: float
    ) -> dict[str, Any]:
        """One update of the designer's adapter; returns metrics."""
        metric = self.spec.metric
        lessons = [
            each.episode
            if math.isnan(each.reward)
            else dataclasses.replace(
                each.episode, rewards=(Reward(metric, each.reward), *each.episode.rewards)
            )
            for each in written
        ]
        self.run.log.collected(step, lessons, metric, seconds, {})
        return policy_gradient(self, step, lessons, partial(policy_loss, config=self.args))

    # search in a chat

    def _asked(self, step: int, tasks: Sequence[Task]) -> Episode:
        """The helper's next workflow, after the chat so far."""
        if "start" not in self.chat:
            scores = self._scores(self.example, tasks)
            self.chat["start"] = math.fsum(scores.values()) / len(scores)
            self.chat["turns"] = []
        opening = (
            f"{self.target.design_prompt(self.example)}\n\nThe example scores"
            f" {self.chat['start']:.4f} on tasks of this kind."
        )
        said = [Message("user", opening)]
        for turn in self.chat["turns"]:
            said += [Message("assistant", turn["reply"]), Message("user", turn["told"])]
        talk = WorkflowDesign([self._helper(said[:-1])], target=self.target)
        return self.run.rollouts.ask(talk, Task(f"workflow-{step}", said[-1].content))

    def _helper(self, said: Sequence[Message]) -> AgentSpec:
        """The helper in a chat in which this has been said, with room for a workflow."""
        agent = self.spec.helper(DESIGNER)
        own = Sampling(temperature=self.args.temperature, max_tokens=self.args.max_workflow_length)
        return dataclasses.replace(
            agent, sampling=agent.sampling or own, demos=(*agent.demos, *said)
        )

    def _remember(self, written: ScoredWorkflow) -> None:
        """Put a workflow and what came of it into the chat. A talk that failed leaves nothing."""
        if math.isnan(written.reward):
            self.run.log.warn(f"no workflow was written: {written.fault}")
            return
        told = (
            REFUSED.format(fault=written.fault)
            if written.fault
            else SCORED.format(score=written.reward)
        )
        turn = {"reply": written.episode.output, "told": told}
        self.chat["turns"] = [*self.chat["turns"], turn][-self.args.history :]

    # what it came to

    def report(self) -> dict[str, Any]:
        """Also `designs`: workflows sampled from the designer as it began and as it is, followed on
        held-out tasks; those that are none count 0."""
        if self.args.in_context:
            return super().report()
        states = {"base": self.run.origin, "trained": None}
        found = {name: self._sampled_designs(name, state) for name, state in states.items()}
        rows = [
            (name, f"{row['valid']:.3f}", f"{row['score']:.3f}", str(row["distinct"]))
            for name, row in found.items()
        ]
        section = table_section(
            "workflows sampled from the designer, followed on held-out tasks",
            ("designer", "valid", "score, 0 if invalid", "different ones"),
            rows,
        )
        return {**super().report(), "designs": found, **stored(section)}

    def _sampled_designs(self, name: str, state: TeamState | None) -> dict[str, float]:
        """Shares and scores of a group of workflows."""
        designs = self._designs("workflow", state, "eval", f"designs-{name}")
        texts = [self.target.read(episode.output or "")[0] for episode in designs]
        scores = {
            text: mean([*self._scores(text, self.spec.eval_tasks, "eval").values()]) or 0.0
            for text in dict.fromkeys(filter(None, texts))
        }
        return {
            "valid": sum(map(bool, texts)) / len(texts),
            "score": sum(scores.get(text, 0.0) for text in texts) / len(texts),
            "distinct": len(scores),
        }
