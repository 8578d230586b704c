"""The base class of systems, and how settings name and change one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .lookup import Untrusted, object_named
from .settings import check_fields
from .state import Param, agent_params
from .team import Team
from .transcript import Output
from .types import AgentSpec, Sampling, SettingError, Task, Turn, from_json, nearest, to_json


def _agent(given: Any) -> AgentSpec:
    if isinstance(given, AgentSpec):
        return given
    return AgentSpec(given) if isinstance(given, str) else from_json(AgentSpec, given, "agents")


@dataclass
class System:
    """Base of every interaction pattern: a dataclass of its settings, with one coroutine `run(task,
    team) -> output`.

    `agents` takes names, `AgentSpec`s or mappings of their fields. Settings are JSON values, so a
    checkpoint can hold class and arguments. Bounds may stand at a field: `rounds: int =
    setting("answers of each agent", 2, at_least=1)`.
    """

    agents: Sequence[str | AgentSpec] = ()

    def __post_init__(self) -> None:
        if not self.agents:
            raise SettingError(
                f"{type(self).__name__}(agents=...): expected at least one agent name"
            )
        if isinstance(self.agents, (str, AgentSpec)):
            raise SettingError(
                f"{type(self).__name__}(agents={self.agents!r}): expected a list of agents, got one"
            )
        self.agents = tuple(_agent(a) for a in self.agents)
        names = [agent.name for agent in self.specs]
        for name in names:
            if names.count(name) > 1:
                raise SettingError(
                    f"agents: two agents are named {name!r}; names are unique, only policies may be"
                    " shared"
                )
        check_fields(self)

    @property
    def specs(self) -> tuple[AgentSpec, ...]:
        """The agents, in the order of a team's iteration."""
        return self.agents  # type: ignore[return-value]

    def with_agents(self, agents: Sequence[AgentSpec]) -> System:
        """The same system with other agents."""
        return dataclasses.replace(self, agents=tuple(agents))

    def arguments(self) -> dict[str, Any]:
        """The settings besides the agents, as JSON: `type(system)(agents=...,
        **system.arguments())` rebuilds it."""
        return {
            f.name: to_json(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name != "agents"
        }

    def params(self) -> tuple[Param, ...]:
        """What a method may change: every agent's prompt, demonstrations and policy; a system with
        values of its own adds them."""
        return agent_params(self.specs)

    def conflict(self, values: Mapping[str, Any]) -> str | None:
        """Why these values by name are refused together, though their params take each of them;
        None if they are not."""
        return None

    async def run(self, task: Task, team: Team) -> Turn | Output | str:
        """The episode: asks the agents of `team` in whatever order and returns the team's output.
        `task` holds no answer."""
        raise TypeError(
            f"{type(self).__name__} has no run(task, team); write it as a coroutine that returns"
            " the output"
        )


def build_system(settings: Mapping[str, Any]) -> System:
    """A System from `{class: module:Class, ...arguments}`."""
    arguments = dict(settings)
    name = arguments.pop("class", None)
    if not name:
        raise SettingError(
            "system.class: missing; expected module:Class, such as"
            " marlora.agents.patterns.chain:Chain"
        )
    return with_settings(system_class(str(name)), arguments)


def system_class(name: str) -> type[System]:
    """The System that `module:Class` names. Raises `SettingError`; `Untrusted` where a stranger
    named one that is not ours."""
    try:
        cls = object_named("system", name, "module:Class")
    except Untrusted:
        raise
    except SettingError as error:
        raise SettingError(str(error).replace("system ", "system.class ", 1)) from error
    if not (isinstance(cls, type) and issubclass(cls, System)):
        raise SettingError(
            f"system.class {name!r}: expected a subclass of marlora.agents.system:System, found"
            f" {cls!r:.80}"
        )
    return cls


def with_settings(cls: type[System], arguments: Mapping[str, Any]) -> System:
    """A System of this class. Raises `SettingError` at a setting that it does not have."""
    known = sorted(f.name for f in dataclasses.fields(cls))
    for key in arguments:
        if key not in known:
            raise SettingError(
                f"system.{key}: {cls.__name__} has no such setting; {nearest(key, known)}"
            )
    return cls(**arguments)


def override_agents(
    system: System, changes: Mapping[str, Mapping[str, Any]], sampling: Sampling = Sampling()
) -> tuple[AgentSpec, ...]:
    """The system's agents with fields changed by name (the `agents:` mapping of a recipe).

    Of `sampling`, fields may be given alone; the others stay the agent's own, or the run's
    (`sampling`).
    """
    known = {agent.name: agent for agent in system.specs}
    for name, change in changes.items():
        if name not in known:
            raise SettingError(
                f"agents.{name}: no such agent in {type(system).__name__}; {nearest(name, known)}"
            )
        if not isinstance(change, Mapping):
            raise SettingError(
                f"agents.{name}: expected a mapping of fields to change, got {change!r}"
            )
        if change.get("name", name) != name:
            raise SettingError(
                f"agents.{name}.name: the system names its agents, and this one {name!r}; got"
                f" {change['name']!r}"
            )
    return tuple(_changed(agent, changes.get(agent.name, {}), sampling) for agent in known.values())


def _changed(agent: AgentSpec, change: Mapping[str, Any], sampling: Sampling) -> AgentSpec:
    fields = {**to_json(agent), **change}
    if isinstance(change.get("sampling"), Mapping):
        fields["sampling"] = {**to_json(agent.sampling or sampling), **change["sampling"]}
    return from_json(AgentSpec, fields, f"agents.{agent.name}")
