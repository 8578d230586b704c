"""A checkpoint loaded for inference: its system, agents and adapters on running engines, without a
trainer.

`system.json` names all of these, and anyone may have written it. What may be imported for it is
decided in one place, by the mark of what a name resolves to (`agents.lookup`): for another System
the caller names the class; other code it names (rewards, tools, operators, task sets, programs) and
models it would ask over the network need the caller's `trust`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.lookup import AGREE, Untrusted, only_trusted
from ...agents.state import TeamState, outside_models
from ...agents.system import System, system_class, with_settings
from ...agents.tools.tools import resolve_tools
from ...agents.types import BASE, AgentSpec, PolicySpec, Sampling, SettingError, Task, from_json
from ..engines.adapter_versions import FILES
from ..engines.base import Engine
from ..engines.config import EngineConfig
from ..engines.factory import start_engine
from ..episodes.completers import completers
from ..episodes.runner import EpisodeLimits, EpisodeRunner
from ..files import files_sha256
from ..renderer import ChatRenderer, load_tokenizer
from ..rewards.builtin import resolve_rewards
from ..rewards.helpers import served
from ..rewards.judge import asked_policies
from ..rewards.scoring import RewardFn, fn_name
from ..tasks.registry import load_tasks, split_hash
from .reader import ORIGIN, as_data, outside_addresses, read_checkpoint, read_helpers, read_values


@dataclasses.dataclass
class LoadedEngine:
    """A running engine and the adapter versions it has loaded."""

    engine: Engine
    versions: set[str] = dataclasses.field(default_factory=set)

    async def load(
        self, folder: Path, policies: Sequence[PolicySpec], data: Mapping[str, Any], scratch: Path
    ) -> dict[str, str]:
        """Publish a checkpoint's trained adapters that the engine has not loaded yet; returns their
        versions by policy."""
        versions = {
            p.name: version_name(p.name, data)
            for p in policies
            if data["adapters"].get(p.name, {}).get("trained")
        }
        new = {
            p: copy_adapter(folder, p, data, scratch)
            for p, version in versions.items()
            if version not in self.versions
        }
        if new:
            await self.engine.publish(new)
        self.versions.update(versions.values())
        return versions


def base_of(name: str, path: str, data: Mapping[str, Any]) -> tuple[ChatRenderer, str]:
    """The renderer of a checkpoint's base that lies at `path`, and a key that tells it from other
    bases. Raises `SettingError` if it is another base."""
    entry = data["bases"][name]
    check_base(name, path, entry.get("files"))
    renderer = ChatRenderer(load_tokenizer(path), **entry.get("chat_template_kwargs", {}))
    if renderer.template_hash != entry["template"]:
        raise SettingError(
            f"{path}: its chat template is not the one the checkpoint was trained with; give"
            " --model FOLDER with that base"
        )
    return renderer, entry.get("files") or path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint is loaded.

    Args:
        scratch: folder for version folders and the server's log; `LoadedTeam.close` deletes its
            `versions` part.
        locate: from a base's name to the folder where it lies now; its files must be those that the
            run was trained on.
        system: `module:Class`, needed if the checkpoint's System is not one of `marlora.agents`.
        rewards: instead of the checkpoint's own.
        seed: of the episodes.
        trust: import rewards, tools and task sets the checkpoint names outside marlora, and ask
            models it names by URL.
        say: gets lines of progress.
        engine: a running engine to use instead of starting one (tests).
        guests: policies of teams that will be loaded beside this one, so that the server has room
            for them.
    """

    scratch: Path
    locate: Callable[[str], str] = str
    system: str = ""
    rewards: Sequence[str] | None = None
    seed: int = 0
    trust: bool = False
    say: Callable[[str], None] = print
    engine: Engine | None = None
    guests: Sequence[PolicySpec] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointBase:
    """A base model of a checkpoint.

    Args:
        path: where it lies now.
        key: tells it from other bases (see `base_of`).
        policies: those with adapters on it.
        without_adapter: names of policies that speak with it and have none: `base`, and those of
            helpers.
    """

    path: str
    renderer: ChatRenderer
    key: str
    policies: tuple[PolicySpec, ...]
    without_adapter: tuple[str, ...]


@dataclasses.dataclass
class TeamEngines:
    """The engines of a checkpoint's team.

    Args:
        by_base: by the base's key (see `base_of`); another checkpoint on the same base can use
            them.
        used: one per base of the checkpoint. started: those that were started for this team.
        of_policy: engine and renderer per policy.
        versions: adapter version per trained policy.
    """

    by_base: dict[str, LoadedEngine]
    used: list[Engine] = dataclasses.field(default_factory=list)
    started: list[Engine] = dataclasses.field(default_factory=list)
    of_policy: dict[str, tuple[Engine, ChatRenderer]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    async def close(self) -> None:
        """Stop the engines that were started for this team."""
        for engine in self.started:
            await engine.close()


async def load_team(
    checkpoint: str | Path,
    config: EngineConfig,
    options: LoadOptions,
    beside: Sequence[LoadedTeam] = (),
) -> LoadedTeam:
    """Load a checkpoint's team and start what it needs; end it with `await team.close()`.

    `beside`: loaded teams whose engines serve this one too, where the base is the same; they have
    to stay open as long.
    """
    folder = Path(checkpoint)
    data = read_checkpoint(folder)
    system, rewards = resolve_names(folder, data, options)
    bases = locate_bases(data, options, set(asked_policies(rewards)))
    engines_by_base = {key: each for other in beside for key, each in other.loaded_engines.items()}
    engines = await start_engines(folder, data, bases, engines_by_base, config, options)
    state = TeamState(
        {p: v for p, v in engines.versions.items() if p in data["policies"]},
        read_values(folder, data),
        outside_models(policies_of(data)),
    )
    rollouts = EpisodeRunner(
        system,
        completers({**policies_of(data), **asked_policies(rewards)}, engines.of_policy),
        rewards,
        state,
        from_json(Sampling, data["sampling"]),
        EpisodeLimits(),
        options.seed,
        untrusted=not options.trust,
    )
    return LoadedTeam(folder, data, rollouts, engines, options)


def resolve_names(
    folder: Path, data: Mapping[str, Any], options: LoadOptions
) -> tuple[System, list[RewardFn]]:
    """The trust check: the system and the rewards that a checkpoint names, imported as far as
    `options` allows. Raises `SettingError` with what it names."""
    if (outside := outside_addresses(data)) and not options.trust:
        raise SettingError(f"{folder}: the checkpoint names {', '.join(outside)}; {AGREE}")
    system = checkpoint_system(folder, data, options.system, options.trust)
    helpers = read_helpers(data)
    if options.rewards is not None:
        return system, served(resolve_rewards(options.rewards), helpers)
    with as_data(folder, data, options.trust):
        return system, served(resolve_rewards(data["rewards"]), helpers)


def policies_of(data: Mapping[str, Any]) -> dict[str, PolicySpec]:
    """The policies of a checkpoint by name."""
    return {name: from_json(PolicySpec, spec) for name, spec in data["policies"].items()}


def locate_bases(
    data: Mapping[str, Any], options: LoadOptions, asked: Collection[str] = ()
) -> list[CheckpointBase]:
    """The base check: each base of a checkpoint that is needed, found by `options.locate` and
    checked to have the files and the chat template that the run was trained with. `asked`: the
    policies of helpers that are asked; the others need no base."""
    policies, default = policies_of(data), data["base"]["name"]
    bare = {
        helper.policy.name: helper.policy.base or default
        for helper in read_helpers(data).values()
        if helper.policy.name in asked and not helper.policy.url
    }
    bare[BASE] = (data["policies"].get(BASE) or {}).get("base") or default
    bases = []
    for name, entry in data["bases"].items():
        own = tuple(policies[policy] for policy in entry["policies"])
        without_adapter = tuple(policy for policy, base in bare.items() if base == name)
        if own or without_adapter:
            path = options.locate(name)
            renderer, key = base_of(name, path, data)
            bases.append(CheckpointBase(path, renderer, key, own, without_adapter))
    return bases


async def start_engines(
    folder: Path,
    data: Mapping[str, Any],
    bases: Sequence[CheckpointBase],
    running: Mapping[str, LoadedEngine],
    config: EngineConfig,
    options: LoadOptions,
) -> TeamEngines:
    """The engine start: one engine per base, a running one where there is one for the base, with
    the checkpoint's adapters loaded. On an error those that were started are stopped."""
    engines = TeamEngines(dict(running))
    try:
        for base in bases:
            if base.key not in engines.by_base:
                engine = options.engine or await start_engine(
                    base.path,
                    base.renderer,
                    [*base.policies, *options.guests],
                    config,
                    folder=options.scratch,
                    say=options.say,
                )
                engines.started.append(engine)
                engines.by_base[base.key] = LoadedEngine(engine)
            loaded = engines.by_base[base.key]
            engines.used.append(loaded.engine)
            names = [*(policy.name for policy in base.policies), *base.without_adapter]
            engines.of_policy |= dict.fromkeys(names, (loaded.engine, base.renderer))
            engines.versions |= await loaded.load(folder, base.policies, data, options.scratch)
    except BaseException:
        await engines.close()
        raise
    return engines


class LoadedTeam:
    """A checkpoint's team on running engines; see `load_team`.

    Attributes:
        data: the checkpoint's `system.json`.
        rollouts: plays episodes.
        engines: one per base.
        state: what the checkpoint's team plays with: every trained adapter, and the values.
        versions: the adapter versions of `state`.
        origin: the values with which its run began.
        loaded_engines: by the base's key; another checkpoint on the same base can use them.
    """

    def __init__(
        self,
        folder: Path,
        data: dict[str, Any],
        rollouts: EpisodeRunner,
        engines: TeamEngines,
        options: LoadOptions,
    ) -> None:
        self.folder, self.data, self.rollouts, self.options = folder, data, rollouts, options
        self.engines, self.loaded_engines = engines.used, engines.by_base
        self.state, self.versions = rollouts.state, dict(rollouts.state.versions)
        self.origin = read_values(folder, data, ORIGIN)
        self._team_engines = engines

    @property
    def metric(self) -> str:
        """Name of the first reward."""
        return fn_name(self.rollouts.rewards[0])

    def tasks(self, name: str = "", limit: int | None = None, split: str = "eval") -> list[Task]:
        """Tasks by name, or the checkpoint's own held-out ones, which must still have the hash they
        had."""
        if limit is not None and limit < 1:
            raise SettingError(f"num_tasks: expected at least 1, got {limit}")
        own = self.data["tasks"]
        if not own["name"] and not name:
            raise SettingError(
                "tasks: the checkpoint's were given as lists in Python; name a set (--tasks)"
            )
        if name and name != own["name"]:
            return load_tasks(name, split, seed=own["seed"], limit=limit)
        with as_data(self.folder, self.data, self.options.trust):
            tasks = load_tasks(own["name"], split, seed=own["seed"], **own["args"])
        if split == "eval":
            tasks = tasks[: own["num_eval_tasks"]]
            if split_hash(tasks) != own["eval"]:
                raise SettingError(
                    f"tasks {own['name']!r}: the held-out split is not the one of the checkpoint"
                    " (its hash differs)"
                )
        return tasks[:limit]

    async def close(self) -> None:
        """Stop the engines that were started for this team; those of a team it was loaded beside
        go on."""
        await self._team_engines.close()
        if self._team_engines.started:
            shutil.rmtree(self.options.scratch / "versions", ignore_errors=True)


def checkpoint_system(
    folder: Path, data: Mapping[str, Any], named: str, trust: bool = False
) -> System:
    """The System of a checkpoint with its agents; their tools are resolved too.

    A class outside marlora is imported only if the caller names it (`named`), even with `trust`.
    What its arguments name is the checkpoint's.
    """
    path = data["system"]["class"]
    if named:
        cls = system_class(named)
    else:
        try:
            with only_trusted():
                cls = system_class(path)
        except Untrusted as refused:
            raise SettingError(
                f"{folder}: the checkpoint's system is {path}; give --system {path} to import it"
            ) from refused
    with as_data(folder, data, trust):
        agents = tuple(from_json(AgentSpec, agent) for agent in data["agents"])
        system = with_settings(cls, {"agents": agents, **data["system"]["arguments"]})
        for agent in system.specs:
            resolve_tools(agent.tools)
        return system


def check_base(name: str, path: str, expected: str | None) -> None:
    """Raise `SettingError` unless the files of the base at `path` have the expected hash (None: any
    will do)."""
    if expected is None:
        return
    if not Path(path).is_dir():
        raise SettingError(
            f"base {path!r}: no such folder; give --model FOLDER with the base the checkpoint was"
            f" trained on ({name})"
        )
    if files_sha256(path) != expected:
        raise SettingError(
            f"base {path!r}: its files differ from those the checkpoint was trained on ({name})"
        )


def version_name(policy: str, data: Mapping[str, Any]) -> str:
    """The adapter version of a policy in a checkpoint: policy, step and the adapter's hash."""
    return f"{policy}-v{data['step']}-{data['adapters'][policy]['sha256'][:8]}"


def copy_adapter(checkpoint: Path, policy: str, data: Mapping[str, Any], scratch: Path) -> Path:
    """A version folder for the engine, named by `version_name` and holding the two PEFT files
    only."""
    target = scratch.resolve() / "versions" / version_name(policy, data)
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(checkpoint / "adapters" / policy / file, target / file)
    return target
