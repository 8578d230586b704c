"""Variants of a team to evaluate: the rungs of the ladder (single agent, base team, prompts only),
one adapter at a time, and teams of agents from two checkpoints.

All are `Variant`s made from open checkpoints (`LoadedTeam`). Names begin with `mark` (of a
checkpoint, when there are several).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.patterns.chain import Chain
from ...agents.state import TeamState
from ...agents.types import BASE, AgentSpec, SettingError, Task
from ..checkpoints.team import LoadedTeam
from ..episodes.codec import kind_of
from ..episodes.runner import EpisodeRunner
from ..episodes.store import Store
from .suite import Variant

PROMPTS = (".prompt", ".demos")  # of `values`: texts that stand in an agent's chat


def variant(
    team: LoadedTeam,
    name: str,
    versions: Mapping[str, str],
    rollouts: EpisodeRunner | None = None,
    values: Mapping[str, Any] | None = None,
) -> Variant:
    """The team's own players (or `rollouts`) with these adapter versions and values (None: those
    of the checkpoint)."""
    state = team.state.with_versions(versions)
    if values is not None:
        state = dataclasses.replace(state, values=dict(values))
    return Variant(name, rollouts or team.rollouts, state, hashes(team), bases_of(team))


def hashes(team: LoadedTeam) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in team.data["adapters"].items()}


def bases_of(team: LoadedTeam) -> dict[str, str]:
    """By policy the weights below its adapter: its base by the hash of the base's files, or by name
    where it has none here."""
    return {
        policy: base.get("files") or name
        for name, base in team.data["bases"].items()
        for policy in base["policies"]
    }


def base_team(team: LoadedTeam, mark: str = "") -> Variant:
    """The team with every adapter off and the values that its run began with."""
    return variant(team, f"{mark}base team", {}, values=team.origin)


def trained_team(team: LoadedTeam, versions: Mapping[str, str], mark: str = "") -> Variant:
    return variant(team, f"{mark}{trained_name(team, versions)}", versions)


def trained_name(team: LoadedTeam, versions: Mapping[str, str]) -> str:
    """`trained team, per-agent LoRA`, or shared-policy if all agents speak with one adapter; the
    adapters if only some are on; `trained team` where no adapter was learnt."""
    if not team.versions:
        return "trained team"
    if set(versions) != set(team.versions):
        return f"adapters: {', '.join(versions) or 'none'}"
    shared = (
        len(team.rollouts.system.specs) > 1
        and len({agent.policy for agent in team.rollouts.system.specs}) == 1
    )
    return f"trained team, {'shared-policy' if shared else 'per-agent'} LoRA"


def ladder(team: LoadedTeam, mark: str = "") -> list[Variant]:
    """The rungs below the trained team: single agent, team without prompts, base team, and the
    values that training found without its adapters."""
    player, system = team.rollouts, team.rollouts.system
    plain = {k: v for k, v in team.origin.items() if not k.endswith(PROMPTS)}
    bare = [dataclasses.replace(agent, prompt="", demos=()) for agent in system.specs]
    alone = Chain((AgentSpec("agent", policy=BASE, sampling=system.specs[-1].sampling),))
    rungs = []
    if BASE in player.completers:
        rungs.append(
            variant(
                team,
                f"{mark}single agent",
                {},
                dataclasses.replace(player, system=alone, state=TeamState()),
                {},
            )
        )
    if plain != dict(team.origin) or any(agent.prompt or agent.demos for agent in system.specs):
        without = dataclasses.replace(player, system=system.with_agents(bare))
        rungs.append(variant(team, f"{mark}team without prompts", {}, without, plain))
    rungs.append(base_team(team, mark))
    if team.versions and team.state.values != team.origin:
        rungs.append(variant(team, f"{mark}values-only team", {}))
    return rungs


def ablations(team: LoadedTeam, versions: Mapping[str, str], mark: str = "") -> list[Variant]:
    """Each adapter alone, and (of three and more) all but each."""
    if len(versions) < 2:
        return []
    alone = [
        variant(team, f"{mark}only {name}", {name: version}) for name, version in versions.items()
    ]
    if len(versions) == 2:
        return alone
    return alone + [
        variant(team, f"{mark}all but {name}", {p: v for p, v in versions.items() if p != name})
        for name in versions
    ]


def cross_play(teams: Mapping[str, LoadedTeam]) -> list[tuple[str, str, str, Variant]]:
    """(policy, checkpoint it is from, checkpoint of the others, team): every adapter in every other
    checkpoint's team.

    Of two policies one matrix tells all: the other is its transpose. Raises `SettingError` unless
    all have the same policies and base.
    """
    first, *rest = teams.values()
    names = list(first.versions)
    for mark, team in zip(list(teams)[1:], rest, strict=True):
        if set(team.versions) != set(names) or bases_of(team) != bases_of(first):
            raise SettingError(
                f"cross-play: {mark} has adapters {sorted(team.versions)} on its base,"
                f" {next(iter(teams))} {sorted(names)}"
            )
    if len(teams) < 2 or len(names) < 2:
        raise SettingError(
            f"cross-play: at least two checkpoints of at least two adapters; got {len(teams)} of"
            f" {names}"
        )
    crossed = []
    for policy in names[:1] if len(names) == 2 else names:
        for guest, host in itertools.permutations(teams, 2):
            versions = {**teams[host].versions, policy: teams[guest].versions[policy]}
            sha256 = {**hashes(teams[host]), policy: hashes(teams[guest])[policy]}
            name = f"{policy} of {guest}, others of {host}"
            crossed.append(
                (
                    policy,
                    guest,
                    host,
                    Variant(
                        name,
                        teams[host].rollouts,
                        teams[host].state.with_versions(versions),
                        sha256,
                        bases_of(first),
                    ),
                )
            )
    return crossed


def distinct(
    variants: Iterable[Variant], seed: int, greedy: bool
) -> tuple[list[Variant], dict[str, str]]:
    """The variants without those that are the same as an earlier one, and {name: the earlier
    one's} of those."""
    first_of: dict[str, Variant] = {}
    same: dict[str, str] = {}
    for each in variants:
        first = first_of.setdefault(each.key(seed, greedy), each)
        if first is not each:
            same[each.name] = first.name
    return list(first_of.values()), same


# what was trained on


def trained_on(
    checkpoint: Path, team: LoadedTeam, more: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Prompt by task id of what a checkpoint may have learnt from, and where that is written.

    The run's own store, the stores its settings name, and `more`; where the run is not beside the
    checkpoint, the training split of its task set. An empty list: it is not known.
    """
    stores = [Path(name) for name in more]
    if checkpoint.resolve().parent.name == "checkpoints":
        run = checkpoint.resolve().parent.parent
        stores += [run / "episodes", *_given(run)]
    prompts: dict[str, str] = {}
    where = []
    for folder in stores:
        folder = folder / "episodes" if (folder / "episodes").is_dir() else folder
        if Store(folder).files():
            prompts |= asked(Store(folder))
            where.append(str(folder))
        elif str(folder) in more:
            raise SettingError(
                f"--trained_on {folder}: no episodes there; expected a run or a store"
            )
    if not where and team.data["tasks"]["name"]:
        tasks: Sequence[Task] = team.tasks(split="train")
        prompts |= {task.id: task.prompt for task in tasks}
        where.append(f"the training split of {team.data['tasks']['name']}")
    return prompts, where


def asked(store: Store) -> dict[str, str]:
    """Prompt by task id of every episode but those of evaluations: what may have been trained
    on."""
    lines = (data for data in store.lines() if kind_of(data) != "eval")
    return {data["task"]["id"]: data["task"]["prompt"] for data in lines}


def _given(run: Path) -> list[Path]:
    """Stores that a run learnt from instead of playing (setting `episodes`)."""
    import yaml

    path = run / "config.yaml"
    config: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [Path(config["episodes"])] if config.get("episodes") else []
