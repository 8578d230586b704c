"""A checkpoint at work again: its system, agents and adapters on an engine, without any trainer.

`system.json` names all of it. Only classes of `marlora.agents` are imported from there; for another System the caller names the class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..agents.team import System
from ..agents.types import AgentSpec, PolicySpec, Sampling, SettingError, Task, from_json, nearest
from .engines.engine import Engine
from .engines.start import EngineConfig, start_engine
from .play import Limits, Rollouts
from .rewards import resolve_rewards
from .speakers import speakers
from .tasks import load_tasks, split_hash
from .tokens import ChatTokens, load_tokenizer


def files_sha256(model: str) -> str | None:
    """A hash of a local model's tensor files by name and content; None for a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def build_system(settings: Mapping[str, Any]) -> System:
    """A System from `{class: module:Class, ...arguments}`."""
    given = dict(settings)
    name = given.pop("class", None)
    if not name:
        raise SettingError("system.class: missing; expected module:Class, such as marlora.agents.chain:Chain")
    module, _, cls = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"system.class {name!r}: cannot be imported ({error}); expected module:Class") from error
    if not (isinstance(found, type) and issubclass(found, System)):
        raise SettingError(f"system.class {name!r}: expected a subclass of marlora.agents.team:System, found {found!r}")
    known = sorted(f.name for f in dataclasses.fields(found))
    for key in given:
        if key not in known:
            raise SettingError(f"system.{key}: {cls} has no such setting; {nearest(key, known)}")
    return found(**given)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """`system.json` of a checkpoint. Raises `SettingError` with the path if it is none."""
    path = folder / "system.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; expected a checkpoint such as RUN/checkpoints/step-000010") from error
    except ValueError as error:
        raise SettingError(f"{path}: not JSON ({error}); the checkpoint is damaged") from error
    for name, entry in data["adapters"].items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / "adapters" / name / file).is_file():
                raise SettingError(
                    f"{folder}/adapters/{name}/{file}: missing, though system.json names the adapter ({entry['sha256'][:8]})"
                )
    return data


class ServedTeam:
    """A checkpoint's team on running engines. Make it with `await ServedTeam.open(...)`, end it with `await close()`.

    `rollouts` plays; `versions` is the team version with every trained adapter on; `tasks(...)` loads the held-out tasks.
    """

    def __init__(
        self, data: dict[str, Any], rollouts: Rollouts, engines: Sequence[Engine], versions: dict[str, str], scratch: Path
    ) -> None:
        self.data, self.rollouts, self.engines, self.versions, self._scratch = data, rollouts, list(engines), versions, scratch

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
        say: Callable[[str], None] = print,
    ) -> ServedTeam:
        """Start what the checkpoint needs.

        Args:
            locate: from a base's name to where it lies now; its files must be those the run was trained on.
            system: `module:Class`, needed if the checkpoint's System is not one of `marlora.agents`.
            scratch: folder for version folders and the server's log; its `versions` part is deleted by `close`.
            engine: a running engine to use instead (tests).
        """
        folder = Path(checkpoint)
        data = read_checkpoint(folder)
        bases: dict[str, str] = {name: locate(name) for name in data["bases"]}
        for name, path in bases.items():
            check_base(name, path, data["bases"][name].get("files"))
        team = checkpoint_system(data, system)
        policies = {name: from_json(PolicySpec, spec) for name, spec in data["policies"].items()}
        versions: dict[str, str] = {}
        engine_of: dict[str, tuple[Engine, ChatTokens]] = {}
        engines: list[Engine] = []
        try:
            for name, path in bases.items():
                tokens = ChatTokens(load_tokenizer(path))
                if tokens.template_hash != data["bases"][name]["template"]:
                    raise SettingError(f"{path}: its chat template is not the one the checkpoint was trained with")
                own = [policies[p] for p in data["bases"][name]["policies"]]
                running = engine or await start_engine(path, tokens, own, config, folder=scratch, say=say)
                engines.append(running)
                engine_of |= {p.name: (running, tokens) for p in own} | {"base": (running, tokens)}
                staged = {
                    p.name: stage(folder, p.name, data, scratch) for p in own if data["adapters"].get(p.name, {}).get("trained")
                }
                versions |= await running.publish(staged) if staged else {}
        except BaseException:
            for running in engines:
                await running.close()
            raise
        values = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "values").glob("*.json"))}
        rollouts = Rollouts(
            team, speakers(policies, engine_of), resolve_rewards(rewards or data["rewards"]), values,
            from_json(Sampling, data["sampling"]), Limits(), seed,
        )  # fmt: skip
        return cls(data, rollouts, engines, {p: v for p, v in versions.items() if p in policies}, scratch)

    @property
    def metric(self) -> str:
        return self.rollouts.rewards[0].__name__

    def tasks(self, name: str = "", limit: int | None = None, split: str = "eval") -> list[Task]:
        """Tasks by name, or the checkpoint's own held-out ones, which must still have the hash they had."""
        own = self.data["tasks"]
        if name and name != own["name"]:
            return load_tasks(name, split, seed=own["seed"], limit=limit)
        found = load_tasks(own["name"], split, seed=own["seed"], **own["args"])
        if split == "eval":
            found = found[: own["num_eval_tasks"]]
            if split_hash(found) != own["eval"]:
                raise SettingError(f"tasks {own['name']!r}: the held-out split is not the one of the checkpoint (its hash differs)")
        return found[:limit]

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()
        shutil.rmtree(self._scratch / "versions", ignore_errors=True)


def checkpoint_system(data: Mapping[str, Any], named: str) -> System:
    """The System a checkpoint names, with its agents. Other classes than ours are imported only if the caller names them."""
    cls = data["system"]["class"]
    if named and named != cls:
        cls = named
    elif not named and not cls.startswith("marlora.agents."):
        raise SettingError(f"the checkpoint's system is {cls}; give --system {cls} to import it")
    agents = tuple(from_json(AgentSpec, agent) for agent in data["agents"])
    return build_system({"class": cls, "agents": agents, **data["system"]["arguments"]})


def check_base(name: str, path: str, expected: str | None) -> None:
    if expected is None:
        return
    if not Path(path).is_dir():
        raise SettingError(
            f"base {path!r}: no such folder; give --model FOLDER with the base the checkpoint was trained on ({name})"
        )
    if files_sha256(path) != expected:
        raise SettingError(f"base {path!r}: its files differ from those the checkpoint was trained on ({name})")


def stage(checkpoint: Path, policy: str, data: Mapping[str, Any], scratch: Path) -> Path:
    """A version folder for the engine: named by policy, step and hash, holding the two PEFT files only."""
    target = scratch.resolve() / "versions" / f"{policy}-v{data['step']}-{data['adapters'][policy]['sha256'][:8]}"
    target.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(checkpoint / "adapters" / policy / file, target / file)
    return target
