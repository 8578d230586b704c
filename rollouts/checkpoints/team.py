"""A checkpoint at work again: its system, agents and adapters on an engine, without any trainer.

`system.json` names all of it, and anyone may have written it. What may be imported for it is
decided in one place, by the mark of what a name resolves to (`agents.names`): for another System
the caller names the class; other code it names (rewards, tools, operators, task sets, programs) and
models it would ask over the network need the caller's `trust`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.lookup import AGREE, Untrusted, only_trusted
from ...agents.system import System, system_class, with_settings
from ...agents.tools.tools import resolve_tools
from ...agents.types import BASE, AgentSpec, PolicySpec, Sampling, SettingError, Task, from_json
from ..engines.base import Engine
from ..engines.config import EngineConfig
from ..engines.factory import start_engine
from ..episodes.completers import completers
from ..episodes.runner import EpisodeLimits, EpisodeRunner
from ..files import files_sha256
from ..renderer import ChatRenderer, load_tokenizer
from ..rewards.builtin import resolve_rewards
from ..rewards.scoring import fn_name
from ..tasks.registry import load_tasks, split_hash
from .reader import FILES, as_data, outside_models, read_checkpoint


@dataclasses.dataclass
class LoadedEngine:
    """A running engine and the adapter versions it has loaded."""

    engine: Engine
    versions: set[str] = dataclasses.field(default_factory=set)

    async def load(
        self, folder: Path, policies: Sequence[PolicySpec], data: Mapping[str, Any], scratch: Path
    ) -> dict[str, str]:
        """Publish what it lacks of a checkpoint's trained adapters; returns their versions by
        policy."""
        named = {
            p.name: version_name(p.name, data)
            for p in policies
            if data["adapters"].get(p.name, {}).get("trained")
        }
        new = {
            p: copy_adapter(folder, p, data, scratch)
            for p, version in named.items()
            if version not in self.versions
        }
        if new:
            await self.engine.publish(new)
        self.versions.update(named.values())
        return named


def base_of(name: str, path: str, data: Mapping[str, Any]) -> tuple[ChatRenderer, str]:
    """The tokens of a checkpoint's base that lies at `path`, and what tells it from other bases.
    Raises `SettingError` if it is another."""
    told = data["bases"][name]
    check_base(name, path, told.get("files"))
    tokens = ChatRenderer(load_tokenizer(path))
    if tokens.template_hash != told["template"]:
        raise SettingError(
            f"{path}: its chat template is not the one the checkpoint was trained with"
        )
    return tokens, told.get("files") or path


class LoadedTeam:
    """A checkpoint's team on running engines. Make it with `await LoadedTeam.open(...)`, end it
    with `await close()`.

    `rollouts` plays; `versions` is the team version with every trained adapter on; `tasks(...)`
    loads the held-out tasks.
    """

    def __init__(
        self,
        data: dict[str, Any],
        rollouts: EpisodeRunner,
        engines: Sequence[Engine],
        versions: dict[str, str],
        scratch: Path,
        trust: bool = False,
        served: Mapping[str, LoadedEngine] | None = None,
        own: Sequence[Engine] | None = None,
        folder: Path = Path(),
    ) -> None:
        self.data, self.rollouts, self.engines, self.versions = (
            data,
            rollouts,
            list(engines),
            versions,
        )
        self.served = dict(
            served or {}
        )  # by the base's files: what another checkpoint on the same base can use too
        self._scratch, self._trust, self._own = (
            scratch,
            trust,
            list(engines if own is None else own),
        )
        self._folder = folder

    @classmethod
    async def open(
        cls,
        checkpoint: str | Path,
        config: EngineConfig,
        *,
        locate: Callable[[str], str] = str,
        system: str = "",
        rewards: Sequence[str] | None = None,
        scratch: Path,
        seed: int = 0,
        engine: Engine | None = None,
        trust: bool = False,
        say: Callable[[str], None] = print,
        beside: Sequence[LoadedTeam] = (),
        guests: Sequence[PolicySpec] = (),
    ) -> LoadedTeam:
        """Start what the checkpoint needs.

        Args:
            locate: from a base's name to where it lies now; its files must be those the run was
                trained on.
            system: `module:Class`, needed if the checkpoint's System is not one of
                `marlora.agents`.
            scratch: folder for version folders and the server's log; its `versions` part is deleted
                by `close`.
            engine: a running engine to use instead (tests).
            trust: import rewards, tools and task sets the checkpoint names outside marlora, and ask
                models it names by URL.
            beside: open teams whose engines serve this one too, where the base is the same; they
                have to stay open as long.
            guests: policies of teams that will be opened beside this one, so that the server has
                room for them.
        """
        folder = Path(checkpoint)
        data = read_checkpoint(folder)
        if (outside := outside_models(data)) and not trust:
            raise SettingError(f"{folder}: the checkpoint names {', '.join(outside)}; {AGREE}")
        team = checkpoint_system(folder, data, system, trust)
        if rewards is None:
            with as_data(folder, data, trust):
                scored = resolve_rewards(data["rewards"])
        else:
            scored = resolve_rewards(rewards)
        bases: dict[str, str] = {name: locate(name) for name in data["bases"]}
        speaks_as_base = (data["policies"].get(BASE) or {}).get("base") or data["base"]["name"]
        found_at = {name: base_of(name, path, data) for name, path in bases.items()}
        policies = {name: from_json(PolicySpec, spec) for name, spec in data["policies"].items()}
        versions: dict[str, str] = {}
        engine_of: dict[str, tuple[Engine, ChatRenderer]] = {}
        served: dict[str, LoadedEngine] = {
            key: found for other in beside for key, found in other.served.items()
        }
        engines: list[Engine] = []
        started: list[Engine] = []
        try:
            for name, path in bases.items():
                tokens, key = found_at[name]
                own = [policies[p] for p in data["bases"][name]["policies"]]
                if key not in served:
                    started.append(
                        engine
                        or await start_engine(
                            path, tokens, [*own, *guests], config, folder=scratch, say=say
                        )
                    )
                    served[key] = LoadedEngine(started[-1])
                here = served[key]
                engines.append(here.engine)
                speak = [p.name for p in own] + [BASE] * (name == speaks_as_base)
                engine_of |= dict.fromkeys(speak, (here.engine, tokens))
                versions |= await here.load(folder, own, data, scratch)
        except BaseException:
            for running in started:
                await running.close()
            raise
        values = {
            path.stem: json.loads(path.read_text())
            for path in sorted((folder / "values").glob("*.json"))
        }
        rollouts = EpisodeRunner(
            team,
            completers(policies, engine_of),
            scored,
            values,
            from_json(Sampling, data["sampling"]),
            EpisodeLimits(),
            seed,
            untrusted=not trust,
        )
        spoken = {p: v for p, v in versions.items() if p in policies}
        return cls(data, rollouts, engines, spoken, scratch, trust, served, started, folder)

    @property
    def metric(self) -> str:
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
        with as_data(self._folder, self.data, self._trust):
            found = load_tasks(own["name"], split, seed=own["seed"], **own["args"])
        if split == "eval":
            found = found[: own["num_eval_tasks"]]
            if split_hash(found) != own["eval"]:
                raise SettingError(
                    f"tasks {own['name']!r}: the held-out split is not the one of the checkpoint"
                    " (its hash differs)"
                )
        return found[:limit]

    async def close(self) -> None:
        """Stop the engines that were started for this team; those of a team it was opened beside
        are that team's."""
        for engine in self._own:
            await engine.close()
        if self._own:
            shutil.rmtree(self._scratch / "versions", ignore_errors=True)


def checkpoint_system(
    folder: Path, data: Mapping[str, Any], named: str, trust: bool = False
) -> System:
    """The System a checkpoint names, with its agents, whose tools can be found.

    Another class than ours is imported only if the caller names it (`named`), trust or not. What
    its arguments name is the checkpoint's.
    """
    cls = data["system"]["class"]
    if named:
        found = system_class(named)
    else:
        try:
            with only_trusted():
                found = system_class(cls)
        except Untrusted as refused:
            raise SettingError(
                f"{folder}: the checkpoint's system is {cls}; give --system {cls} to import it"
            ) from refused
    with as_data(folder, data, trust):
        agents = tuple(from_json(AgentSpec, agent) for agent in data["agents"])
        made = with_settings(found, {"agents": agents, **data["system"]["arguments"]})
        for agent in made.specs:
            resolve_tools(agent.tools)
        return made


def check_base(name: str, path: str, expected: str | None) -> None:
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
    """Policy, step and hash of what a checkpoint holds for a policy."""
    return f"{policy}-v{data['step']}-{data['adapters'][policy]['sha256'][:8]}"


def copy_adapter(checkpoint: Path, policy: str, data: Mapping[str, Any], scratch: Path) -> Path:
    """A version folder for the engine, named by `version_name` and holding the two PEFT files
    only."""
    target = scratch.resolve() / "versions" / version_name(policy, data)
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(checkpoint / "adapters" / policy / file, target / file)
    return target
