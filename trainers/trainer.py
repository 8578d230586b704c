"""What every trainer shares: evaluate, then rounds of collect -> learn -> publish, then evaluate
again.

A method is a subclass that names its settings and says what a step's episodes teach:

    class MyTrainer(Trainer[MyConfig]):
        Config = MyConfig

        def learn(self, step, episodes):
            done = self.run.learner.learn(step, samples(...)[0], self.loss)
            return self.rows(done, episodes)

`TrainingRun` has what a method uses (`rollouts`, `learner`, `evaluator`, `sync`, `ledger`, `log`).
A method that plays other than `tasks_per_step` tasks overrides `collect`; one that learns something
else than weights overrides `step` and returns the `state` that it proposes, and `parts` for what it
remembers; one that reports more than accuracies overrides `report`, one that learns scalar heads
beside the policies `heads`, one that needs certain rewards or arguments of the system
`extra_rewards` or `system_settings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from ..agents.state import TeamState
from ..agents.system import System
from ..agents.types import SettingError, Task, to_json
from ..rollouts.engines.base import Engine, EngineError
from ..rollouts.evaluation.statistics import Evaluation, paired
from ..rollouts.ledger import BudgetSpent
from ..rollouts.report.html import text as escaped
from ..rollouts.rewards.names import GIVEN, has_known_names, names_given
from ..rollouts.rewards.scoring import RewardFn
from ..rollouts.types import Episode, groups
from .config import RunConfig
from .credit.weights import Advantages, RewardWeights
from .errors import RunError, Stopped
from .loop.run import TrainingRun
from .loop.spec import RunSpec
from .loop.step_result import StepResult
from .monitoring.notebook import report_link
from .update.optimizer_step import UpdateResult
from .update.scalar_heads import HeadSpec
from .values.parts import Part

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T", bound="Trainer[Any]")


class Trainer(Generic[C]):
    """Trains a team by the method of a subclass.

    Args:
        model: the shared base, a folder or hub name; "" takes `args.model`.
        system: the team; None takes `args.system`.
        tasks: a task set's name, or a list of tasks (then give `eval_tasks` too); None takes
            `args.tasks`.
        rewards: functions `(task, episode) -> Reward | float`, or names; None takes `args.rewards`.
        engine: a running engine instead of one that the run starts.

    Raises `SettingError` at once for settings that cannot work, `RunError` or `EngineError` for a
    run that cannot go on. Works in a notebook.
    """

    Config: ClassVar[type[RunConfig]]
    ratios: ClassVar[bool] = (
        False  # does the loss divide by the probability with which a token was sampled?
    )

    def __init__(
        self,
        model: str = "",
        system: System | None = None,
        tasks: str | Sequence[Task] | None = None,
        args: C | None = None,
        *,
        eval_tasks: Sequence[Task] | None = None,
        rewards: Sequence[RewardFn | str] | None = None,
        engine: Engine | None = None,
        recipe: str = "",
    ) -> None:
        self.args: C = args or self.Config()  # type: ignore[assignment]
        self.args.model = model or self.args.model
        if isinstance(tasks, str):
            self.args.tasks, tasks = tasks, None
        self.spec = RunSpec.resolve(
            self.args,
            system,
            tasks=tasks,
            eval_tasks=eval_tasks,
            rewards=rewards,
            extra_rewards=self.extra_rewards(),
            extra_system=self.system_settings(),
            recipe=recipe or type(self).__name__,
        )
        self.spec = dataclasses.replace(self.spec, heads=tuple(self.heads()))
        self.run = TrainingRun(self.spec, engine)
        self.run.add_parts(self.parts())
        self.before: Evaluation | None = None
        self._check_weights()
        if self.ratios:
            self._check_sampling()

    def __repr__(self) -> str:
        """The method, team, tasks and run folder, and how far the run has come."""
        return f"{type(self).__name__}({self.spec.description()}, step={self.run.step})"

    def _repr_html_(self) -> str:
        """The same in a notebook, with a link to the report once there is one."""
        return f"<code>{escaped(repr(self))}</code>{report_link(self.spec.config.folder)}"

    def inside(self, method: type[T], config: RunConfig, values: Mapping[str, Any]) -> T:
        """A trainer of another method that takes its steps inside this run, begun with these
        values beside those in force. What it remembers lasts as long as it does; all that it plays
        and asks is the run's. Raises `SettingError` for settings that cannot work."""
        trainer = method.__new__(method)
        trainer.args, trainer.run, trainer.before = config, self.run, None
        trainer.spec = dataclasses.replace(self.spec, config=config, values=dict(values))
        trainer.parts()
        return trainer

    def all_steps(self) -> TeamState | None:
        """Every step, inside another method's run, until the method is done; the state proposed
        last, None if none was."""
        state: TeamState | None = None
        for step in range(1, self.spec.config.max_steps + 1):
            result = self.step(step)
            state = result.state or state
            if result.done:
                break
        return state

    def _check_weights(self, episodes: Sequence[Episode] = ()) -> None:
        """Refuse weights of rewards that nothing gives: before the run as far as names are known
        then, and from the first step's episodes the rest."""
        args, rewards = self.args, self.spec.rewards
        if not isinstance(args, RewardWeights):
            return
        if episodes:
            given = {reward.name for episode in episodes for reward in episode.rewards}
            given |= names_given(fn for fn in rewards if has_known_names(fn) or fn in GIVEN)
            args.check_names(
                given | set(self.reward_names()), " in the first step (0 where it does not apply)"
            )
        elif not args.episodes and all(map(has_known_names, rewards)):
            args.check_names(names_given(rewards) | set(self.reward_names()))

    def _check_sampling(self) -> None:
        for name, policy in self.spec.policies.items():
            speaks = [
                agent.sampling or self.args.sampling()
                for agent in self.spec.system.specs
                if agent.policy == name
            ]
            if (
                speaks
                and policy.trainable
                and policy.has_adapter
                and not any(sampling.on_policy for sampling in speaks)
            ):
                raise SettingError(
                    f"policies.{name}: its agents sample at temperature 0 or from a cut-off softmax"
                    " (top_p, top_k, min_p, penalties), where a policy gradient is not defined;"
                    " change their sampling or set trainable: false"
                )

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate; returns what stands in `summary.json`. Ctrl-C saves the last
        finished step and goes on up; so does an engine that is gone."""
        run = self.run.open()
        try:
            self.before = run.evaluator.evaluate("before", run.origin)
            self._train_to_the_end()
            run.end()
            after = run.evaluator.evaluate("after")
            return run.summarise(self.before, after, self.report())
        except Stopped:
            run.save()
            raise
        except EngineError as error:
            run.emergency_save(error)
            raise
        except (RunError, SettingError) as error:
            run.record_end(error)
            raise
        finally:
            run.close()

    def _train_to_the_end(self) -> None:
        """The steps that are left, until the method is done or the budget is spent."""
        run = self.run
        try:
            for step in run.steps():
                run.finish(step, self.step(step))
        except BudgetSpent as error:
            run.end_by_budget(error)

    def step(self, step: int) -> StepResult:
        """One step of the method, on every rank: by default `collect`, then `learn`."""
        episodes = self.collect(step)
        if step == 1:
            self._check_weights(episodes)
        return StepResult(self.learn(step, episodes), episodes)

    def parts(self) -> Sequence[Part]:
        """What the method learns or remembers beside weights: tables of logits, an archive. Saved,
        restored and shown to the team by the run. Read once, when `self.spec` is there."""
        return ()

    def heads(self) -> Sequence[HeadSpec]:
        """Scalar heads that the method learns beside the policies: critics, verifiers. Read once,
        when `self.spec` is there and the run is not."""
        return ()

    def extra_rewards(self) -> Sequence[RewardFn | str]:
        """Rewards that the method needs beside those of the settings; names also stand in the run's
        `config.yaml`. Read once, before anything else is there."""
        return ()

    def system_settings(self) -> Mapping[str, Any]:
        """Arguments of `system` that follow from the method's settings, unless the system is given
        as an object. Read once, before anything else is there."""
        return {}

    def reward_names(self) -> Sequence[str]:
        """Names of rewards that the method itself gives to episodes."""
        return ("counterfactual",) if getattr(self.args, "credit", "") == "counterfactual" else ()

    def collect(self, step: int) -> list[Episode]:
        """The step's episodes, the same on every rank."""
        return self.run.rollouts.collect(step)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Update the adapters from the step's episodes; returns the step's metrics (see `rows`)."""
        raise TypeError(
            f"{type(self).__name__} has no learn(step, episodes); it is what makes a method"
        )

    def report(self) -> dict[str, Any]:
        """More keys of `summary.json`. Every rank calls it, for it may evaluate."""
        return self.contributions()

    def rows(
        self,
        done: Mapping[str, UpdateResult],
        episodes: Sequence[Episode],
        advantages: Advantages | None = None,
    ) -> dict[str, dict[str, Any]]:
        """`policies` of the step's metrics: per trainable policy what its update did, how often it
        was called, and the shares of its turns that were truncated and of constant groups."""
        spoken = self.run.learner.spoken_policies
        agents = {
            name: [agent for agent, policy in spoken.items() if policy == name]
            for name in self.run.learner.trainable
        }
        return {
            name: {
                **metrics(done.get(name)),
                **calls_of(episodes, own),
                **shares_of(episodes, own, advantages),
            }
            for name, own in agents.items()
        }

    def contributions(self) -> dict[str, Any]:
        """What each adapter is worth: held-out accuracy with one adapter on and the others off,
        paired against the base team."""
        run, shares = self.run, {}
        if not self.args.ablate_adapters:
            return {}
        state, others = run.state, run.origin.versions
        for policy in run.learner.trained:
            alone = {**others, **{p: v for p, v in state.versions.items() if p == policy}}
            result = run.evaluator.evaluate(f"only-{policy}", state.with_versions(alone))
            if result is not None and self.before is not None:
                shares[policy] = {**result.summary(), "paired": paired(self.before, result)}
        return {"adapters": shares}

    def evaluate(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Held-out accuracy of the team as it stands, with its 95 % interval."""
        with self.run as run:
            tasks = self.spec.eval_tasks[:num_tasks]
            result = run.evaluator.evaluate(f"step-{run.step:06d}", tasks=tasks)
            return result.summary() if result else {}


def metrics(result: UpdateResult | None) -> Mapping[str, Any]:
    """One policy's row in `metrics.jsonl`: how much was trained, at what rate, and the loss's
    statistics."""
    if result is None:
        return {"tokens": 0}
    clipped = result.stats.get("clip_low", 0.0) + result.stats.get("clip_high", 0.0)
    # The update's own fields last: several minibatches share one row, and the statistics are the
    # last one's.
    return {
        **result.stats,
        **{key: value for key, value in to_json(result).items() if key != "stats"},
        "clipped": clipped,
    }


def calls_of(episodes: Sequence[Episode], agents: Sequence[str]) -> dict[str, float]:
    """How often the agents were called in an episode, its children included; nothing without
    episodes."""
    parents = sum(episode.parent is None for episode in episodes)
    calls = {(e.id, turn.index) for e in episodes for turn in e.turns if turn.agent in agents}
    return {"calls_per_episode": len(calls) / parents} if parents else {}


def shares_of(
    episodes: Sequence[Episode], agents: Sequence[str], advantages: Advantages | None
) -> dict[str, float]:
    """Share of the agents' turns that were truncated, and (given advantages) of constant groups,
    whose comparison taught them nothing."""
    turns = [turn for episode in episodes for turn in episode.turns if turn.agent in agents]
    compared = groups(episodes)
    shares = {
        "truncated": sum(turn.finish_reason == "length" for turn in turns) / max(len(turns), 1)
    }
    if advantages is None:
        return shares
    constant = sum(
        not any(
            advantages.get((e.id, t.index, t.sibling))
            for e in group
            for t in e.turns
            if t.agent in agents
        )
        for group in compared.values()
    )
    return {**shares, "constant_groups": constant / max(len(compared), 1)}
