"""What a run is: settings, team, tasks and rewards, resolved and checked before anything is
loaded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agents.seeds import derive_seed
from ...agents.state import check_values
from ...agents.system import System, build_system, override_agents
from ...agents.tools.tools import resolve_tools
from ...agents.types import BASE, AgentSpec, PolicySpec, SettingError, Task, nearest
from ...rollouts.checkpoints.reader import read_checkpoint, read_values
from ...rollouts.rewards.builtin import resolve_rewards, reward_name
from ...rollouts.rewards.gold import check_answers
from ...rollouts.rewards.helpers import Helper, helpers_of, with_judges
from ...rollouts.rewards.scoring import RewardFn, check_names, fn_name
from ...rollouts.tasks.registry import load_tasks
from ..collection.task_order import tasks_of
from ..config import RunConfig
from ..update.scalar_heads import HeadSpec
from . import checks


@dataclass(frozen=True)
class RunSpec:
    """A run's resolved settings and what they name.

    `agents_of`: the agents of each policy, as the settings say; a value `NAME.policy` may change
    it. `tasks`, `val_tasks`, `eval_tasks`: those to train on, those a method may choose by, and the
    held-out ones. `values`: those the run begins with. `helpers`: agents outside the team. `heads`:
    scalar heads that the method learns beside the policies. `tasks_given`: the tasks came as lists,
    not by the name of a task set. `warnings`: shown when the run begins.
    """

    config: RunConfig
    system: System
    policies: Mapping[str, PolicySpec]
    agents_of: Mapping[str, Sequence[str]]
    tasks: Sequence[Task]
    val_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    rewards: Sequence[RewardFn]
    values: Mapping[str, Any] = field(default_factory=dict)
    helpers: Mapping[str, Helper] = field(default_factory=dict)
    heads: tuple[HeadSpec, ...] = ()
    recipe: str = ""
    tasks_given: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        config: RunConfig,
        system: System | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        eval_tasks: Sequence[Task] | None = None,
        rewards: Sequence[RewardFn | str] | None = None,
        heads: Sequence[HeadSpec] = (),
        extra_rewards: Sequence[RewardFn | str] = (),
        extra_system: Mapping[str, Any] | None = None,
        recipe: str = "",
    ) -> RunSpec:
        """The spec of a run.

        Args:
            config: the settings, resolved.
            system: the team; None takes `config.system`.
            tasks, eval_tasks: None loads `config.tasks`. Training and held-out tasks must not share
                an id.
            rewards: functions or names; None takes `config.rewards`. The first one's name is the
                accuracy of evaluations.
            extra_rewards: what the method itself needs, appended unless it is there; names are
                appended to the spec's `config.rewards`.
            extra_system: arguments that the method adds to those of `config.system`.

        Raises `SettingError` for what cannot work.
        """
        config = _with_extras(config, extra_rewards, extra_system or {})
        system = system or build_system(config.system)  # type: ignore[arg-type]
        agents = override_agents(system, config.agents, config.sampling())  # type: ignore[arg-type]
        system = system.with_agents(agents)
        checks.check_importable(system)
        for agent in system.specs:
            resolve_tools(agent.tools)
        policies = config.policy_specs(system.specs)
        names = {*policies, *(agent.name for agent in system.specs)}
        helpers = helpers_of(config.helpers, names)  # type: ignore[arg-type]
        values = _values(config, system, policies)
        train, val, held_out = _tasks(config, tasks, eval_tasks)
        scores = _rewards(config, rewards, extra_rewards)
        helpers, scores = with_judges(helpers, scores, names)
        warnings = check_answers([] if config.episodes else train, scores, "training")
        warnings += check_answers(held_out, scores[:1], "held-out")
        return cls(
            config,
            system,
            policies,
            {name: [a.name for a in system.specs if a.policy == name] for name in policies},
            train,
            val,
            held_out,
            scores,
            values,
            helpers,
            tuple(heads),
            recipe,
            tasks is not None or eval_tasks is not None,
            tuple(warnings),
        )

    def description(self) -> str:
        """What the run is, in a line: model, team, tasks, rewards and folder."""
        agents = ", ".join(
            name if name == policy else f"{name}: {policy}"
            for name, policy in ((agent.name, agent.policy) for agent in self.system.specs)
        )
        counts = [f"{len(self.tasks)} train"]
        counts += [f"{len(self.val_tasks)} val"] if self.val_tasks else []
        counts += [f"{len(self.eval_tasks)} eval"]
        scores = ", ".join(map(reward_name, self.rewards))
        return (
            f"model={self.config.model!r}, system={type(self.system).__name__}[{agents}],"
            f" tasks=[{', '.join(counts)}], rewards=[{scores}],"
            f" output_dir={self.config.output_dir!r}, max_steps={self.config.max_steps}"
        )

    @property
    def served_policies(self) -> dict[str, PolicySpec]:
        """The policies of the team and of its helpers."""
        own = {helper.policy.name: helper.policy for helper in self.helpers.values()}
        return {**own, **self.policies}

    def helper(self, name: str) -> AgentSpec:
        """The helper of this name, as an agent of a system that asks it. Raises `SettingError`."""
        if name not in self.helpers:
            raise SettingError(
                f"helpers.{name}: missing; this method asks a helper of that name. Give its model:"
                f" helpers: {{{name}: {{url: http://HOST:PORT/v1, base: MODEL}}}}, or {{}} for the"
                " run's own model"
            )
        return self.helpers[name].agent

    @property
    def metric(self) -> str:
        """The reward whose mean is the accuracy of evaluations."""
        return fn_name(self.rewards[0])

    def tasks_of(self, step: int) -> list[Task]:
        """The tasks of a step, see `task_order.tasks_of`."""
        return tasks_of(self.tasks, self.config.tasks_per_step, self.config.seed, step)


def _with_extras(
    config: RunConfig, rewards: Sequence[RewardFn | str], system: Mapping[str, Any]
) -> RunConfig:
    """The settings with the names among `rewards` and the arguments of `system` that a method
    adds."""
    names = [name for name in rewards if isinstance(name, str) and name not in config.rewards]
    if not names and not system:
        return config
    return dataclasses.replace(
        config,
        rewards=[*config.rewards, *names],
        system={**config.system, **system},  # type: ignore[dict-item]
    )


def _rewards(
    config: RunConfig,
    rewards: Sequence[RewardFn | str] | None,
    extra_rewards: Sequence[RewardFn | str],
) -> list[RewardFn]:
    """The reward functions that are given, else those of the settings, then the method's unless
    they are among them."""
    scores = resolve_rewards(rewards if rewards is not None else config.rewards)
    if not scores:
        raise SettingError(
            "rewards: empty; expected at least one function, whose name is the accuracy of"
            " evaluations"
        )
    by_name = config.rewards if rewards is None else ()
    extras = resolve_rewards([extra for extra in extra_rewards if extra not in by_name])
    known = {reward_name(fn) for fn in scores}
    scores += [extra for extra in extras if reward_name(extra) not in known]
    check_names(scores)
    return scores


def _tasks(
    config: RunConfig, tasks: Sequence[Task] | None, eval_tasks: Sequence[Task] | None
) -> tuple[list[Task], list[Task], list[Task]]:
    """(tasks to train on, validation tasks, held-out tasks): those given, else of the task set that
    the settings name."""
    if tasks is not None and eval_tasks is None:
        raise SettingError(
            "eval_tasks: the training tasks are given as a list, so the held-out ones must be"
            " given too"
        )

    def load(split: str) -> Sequence[Task]:
        args: dict[str, Any] = dict(config.task_args)  # type: ignore[arg-type]
        return load_tasks(config.tasks, split, seed=config.seed, **args)

    train = list(tasks if tasks is not None else load("train"))
    held_out = list(eval_tasks if eval_tasks is not None else load("eval"))
    held_out = held_out[: config.num_eval_tasks]
    train, val = _split(train, config)
    checks.check_tasks(train, val, held_out, config)
    return train, val, held_out


def _split(train: list[Task], config: RunConfig) -> tuple[list[Task], list[Task]]:
    """(tasks to train on, validation tasks): `num_val_tasks` of the training tasks, drawn by the
    seed."""
    count = config.num_val_tasks
    if count >= len(train):
        raise SettingError(
            f"num_val_tasks: {count} of {len(train)} training tasks leave none to train on;"
            f" expected fewer than {len(train)}"
        )
    drawn = random.Random(derive_seed(config.seed, "validation")).sample(range(len(train)), count)
    chosen = set(drawn)
    return (
        [task for number, task in enumerate(train) if number not in chosen],
        [train[number] for number in sorted(chosen)],
    )


def _values(
    config: RunConfig, system: System, policies: Mapping[str, PolicySpec]
) -> dict[str, Any]:
    """The values that the run begins with: those of `init`, then those of the settings."""
    given: dict[str, Any] = dict(config.values)  # type: ignore[arg-type]
    if config.init:
        folder = Path(config.init)
        given = {**read_values(folder, read_checkpoint(folder)), **given}
    check_values(system.params(), given)
    for agent in system.specs:
        name = given.get(f"{agent.name}.policy")
        if name is not None and name not in policies and name != BASE:
            raise SettingError(
                f"values.{agent.name}.policy: no policy {name!r}; {nearest(name, list(policies))}"
            )
    return given
