"""Fine-tuning by bootstrapping: a teacher plays the training tasks, and every agent imitates its
turns of the successful runs.

BootstrapFinetune of DSPy (Khattab et al., arXiv:2310.03714; step w of BetterTogether,
arXiv:2407.10930). The teacher is the team itself, with the prompts and demonstrations it has, or
differs from it by `teacher`. Every call of a successful run is a lesson, also where an agent was
called several times. With `exclude_demos` agents learn to answer as they did with demonstrations
where none is shown, and the team goes on without them.

Selection and imitation are those of `methods/imitation/`; what is new here is who plays, and the
chat that a lesson is learnt in: always the one that the agent itself will have, its own prompt and
demonstrations in place of the teacher's. Tokens are the sampled ones; a teacher on another base
than the agent's is re-encoded from its text.

Against the authors' code: an adapter per agent (or per shared policy) and not one model for all; a
lesson belongs to the agent that spoke, and not to a place in the run; success is a reward of at
least `success_threshold`, not any number but 0; a step plays `tasks_per_step` tasks, so one step
with all tasks is theirs. Not taken over: several teachers at once.

accelerate launch recipes/bootstrap_finetune.py [--config recipes/bootstrap_finetune.yaml]
    [--init runs/bootstrap_few_shot/checkpoints/step-000009] [--field value]
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .....agents.settings import setting
from .....agents.types import AgentSpec, Message, PolicySpec, SettingError, Turn, to_json
from .....rollouts.types import Episode
from ....config import RunConfig
from ....credit.filtering import SelectionConfig
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....update.learner import Learner
from ....values.parts import Part
from ...imitation.imitation import ImitationConfig, fit_turns, teacher_text
from ...imitation.sft import opening_messages, selected
from .teacher import TeacherConfig

Openings = Mapping[str, tuple[Message, ...]]  # by agent, the messages at the head of its chats


@dataclass
class BootstrapFinetuneConfig(RunConfig, SelectionConfig, ImitationConfig, TeacherConfig):
    """`RunConfig` with a selection of turns (`SelectionConfig`), epochs of imitation
    (`ImitationConfig`) and a teacher."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/bootstrap_finetune"
    )
    exclude_demos: bool = setting(
        "learn without demonstrations in the prompt, and take them off the agents that learnt",
        False,
    )
    max_steps: int = setting("steps of play, select, imitate", 1, at_least=0)
    num_train_epochs: int = setting("passes over the kept turns of a step", 5, at_least=1)

    def check(self) -> None:
        if self.episodes and self.teacher:
            raise SettingError("teacher: with `episodes` nothing is played; leave one of them out")
        if self.max_staleness and (self.teacher or self.exclude_demos):
            raise SettingError(
                "max_staleness: a teacher that is not the team as it stands plays no steps ahead;"
                " leave it 0"
            )

    def policy_specs(self, agents: tuple[AgentSpec, ...]) -> dict[str, PolicySpec]:
        """The policies of `RunConfig.policy_specs`; those that only the teacher speaks with are
        frozen."""
        specs = super().policy_specs(agents)
        values: dict[str, Any] = self.values  # type: ignore[assignment]
        team = {values.get(f"{agent.name}.policy") or agent.policy for agent in agents}
        taught = {v for k, v in self.teacher_values.items() if k.endswith(".policy")}
        return {
            name: dataclasses.replace(spec, trainable=False) if name in taught - team else spec
            for name, spec in specs.items()
        }


class BootstrapFinetuneTrainer(Trainer[BootstrapFinetuneConfig]):
    """Trains a team by imitation of a teacher's successful turns. Arguments: see `Trainer`."""

    Config = BootstrapFinetuneConfig

    def parts(self) -> Sequence[Part]:
        args, system = self.args, self.spec.system
        args.check_teacher(self.spec)
        given = {**{param.name: param.value for param in system.params()}, **self.spec.values}
        # the demonstrations that the team begins with
        self.student = {
            f"{agent.name}.demos": to_json(given[f"{agent.name}.demos"]) for agent in system.specs
        }
        return []

    def step(self, step: int) -> StepResult:
        """Let the teacher play, select, imitate."""
        result = super().step(step)
        if not self.args.exclude_demos:
            return result
        return dataclasses.replace(result, state=self.run.state.with_values(self._bare()))

    def collect(self, step: int) -> list[Episode]:
        """The teacher's episodes on the step's tasks."""
        rollouts, state = self.run.rollouts, self.run.state
        # demonstrations that the team has lost, the teacher keeps
        kept = {n: v for n, v in self.student.items() if state.values.get(n, v) != v}
        teacher = self.args.teacher_state(state.with_values(kept))
        if self.args.episodes or teacher.values == state.values:
            return super().collect(step)
        start, count = time.perf_counter(), self.args.num_generations
        episodes = rollouts.play(rollouts.tasks_of(step), teacher, n=count, kind="train")
        seconds = time.perf_counter() - start
        self.run.log.collected(step, episodes, rollouts.metric, seconds, {})
        return episodes

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Select, then imitate; returns metrics with the table of what was kept and dropped."""
        run, system = self.run, self.spec.system
        selection = selected(self, step, episodes, self.args)
        own = opening_messages(system, {**run.values, **self._bare()})
        heads = {
            e.state.key: opening_messages(system, e.state.values)
            for e in {e.state.key: e for e in episodes}.values()
        }
        lessons = [lesson(run.learner, e, heads[e.state.key], own) for e in episodes]
        done = fit_turns(run.learner, step, lessons, selection.weights, self.args)
        return {
            "policies": done.into(self.rows(done.updates, episodes)),
            "selection": selection.table(),
            "dropped": done.untrained,
        }

    def _bare(self) -> dict[str, Any]:
        """With `exclude_demos`: no demonstrations, for every agent that learns."""
        learns = self.run.learner.policy_of if self.args.exclude_demos else ()
        return {f"{agent}.demos": [] for agent in learns}


def lesson(learner: Learner, episode: Episode, shown: Openings, own: Openings) -> Episode:
    """The episode with every turn of an agent that learns in the chat that the agent itself will
    have.

    Args:
        shown: the openings that the episode was played with.
        own: those of the agents that learn from it; they take their place.

    Tokens stay those that were sampled, but for a turn of a policy on another base, which is
    encoded from its text. What is changed is `written` and has no log-probabilities.
    """

    def learnt(turn: Turn) -> Turn:
        if turn.agent not in learner.policy_of:
            return turn
        head = shown[turn.agent]
        begins = turn.messages[: len(head)] == head
        messages = own[turn.agent] + turn.messages[len(head) :] if begins else turn.messages
        policy = learner.policy_of[turn.agent]
        foreign = bool(turn.policy) and not _same_base(learner, turn.policy, policy)
        if messages == turn.messages and not foreign:
            return turn
        prompt = learner.base_of(policy).tokens.prompt(messages)
        plain = dataclasses.replace(turn, messages=messages, prompt_ids=tuple(prompt))
        tokens = teacher_text(learner, plain, turn.text).token_ids if foreign else turn.token_ids
        return dataclasses.replace(plain, token_ids=tokens, logprobs=(), source="written")

    return dataclasses.replace(episode, turns=tuple(map(learnt, episode.turns)))


def _same_base(learner: Learner, one: str, other: str) -> bool:
    """Do two policies read the same tokens: adapters on one base, or this base itself?"""

    def base_of(policy: str) -> str | None:
        spec = learner.policies.get(policy)
        if spec is not None and spec.url:
            return None
        return (spec.base if spec else None) or learner.config.model

    return base_of(one) == base_of(other)
