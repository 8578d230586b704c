"""The plan of a comparison: one team, one task set with its splits, one budget, and the arms that
spend it.

A plan is a YAML file:

    output_dir: runs/compare_rules
    team:                       # settings that every arm has: what is played, measured, and by whom
      model: tiny-rules
      system: {class: "marlora.agents.patterns.chain:Chain", agents: [first, last]}
      tasks: marlora.rollouts.tasks.toy:rule_tasks
      rewards: [exact]
      num_val_tasks: 50
    budget: {tokens: 200000}    # of one run: one arm with one seed
    seeds: [0, 1, 2]
    arms:
      grpo: {recipe: grpo_team, settings: {max_steps: 30, learning_rate: 2.0e-3}}
      still: {recipe: grpo_team, control_of: grpo, settings: {max_steps: 30, learning_rate: 0.0}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from marlora.agents.settings import Settings, mapping, setting
from marlora.agents.types import SettingError, nearest, to_json
from marlora.recipes.launch.settings import read_yaml
from marlora.rollouts.budget import Budget
from marlora.trainers.config import RunConfig

from .arms import (
    NAME,
    OF_A_SYSTEM,
    OF_THE_PLAN,
    Arm,
    PlannedRun,
    check_arm_settings,
    known_keys,
    recipe_of,
    seeds_of,
)

ARM_KEYS = ("recipe", "settings", "seeds", "control_of", "compared_with", "output_dir")


class TeamConfig(RunConfig):
    """The settings of the team as it is: nothing is trained."""

    trains_weights: ClassVar[bool] = False


@dataclass
class HeadroomSettings(Settings):
    """Setting `headroom` of a plan: how the headroom test is made."""

    samples: int = setting("sampled episodes per task, of which the best counts", 8, at_least=2)
    model: dict | None = setting(
        "a larger or an outside model in every seat: fields of PolicySpec (base, or url and base)",
        factory=dict,
    )

    def check(self) -> None:
        given = mapping("headroom.model", self.model)
        if given and not given.keys() & {"base", "url"}:
            raise SettingError("headroom.model: expected base or url, the model to compare with")


@dataclass
class PlanSettings(Settings):
    """The keys of a plan's file."""

    output_dir: str = setting("folder of all runs, of compare.json and compare.html", "")
    team: dict | None = setting("settings that every arm has", factory=dict)
    budget: dict | None = setting("most that one run may spend on learning", factory=dict)
    seeds: list | None = setting("a run of every arm for each", factory=lambda: [0])
    arms: dict | None = setting(
        "by name: recipe, settings, seeds, control_of, compared_with", factory=dict
    )
    single_agent: dict | None = setting(
        "fields of the AgentSpec of the row `single agent`; its policy and sampling are by default"
        " those of the team's last agent",
        factory=dict,
    )
    prompts: list | None = setting(
        "hand-written prompts: mappings of values (NAME.prompt, NAME.demos); the best on the"
        " validation tasks is a row",
        factory=list,
    )
    noise_repeats: int = setting(
        "times that the same state is measured again for the noise floor", 4, at_least=2
    )
    vote_tokens: int = setting(
        "tokens per task that self-consistency may take at least, such as what learning took per"
        " held-out task; it has those of the dearest arm where these are more",
        0,
        at_least=0,
    )
    headroom: dict | None = setting("how --headroom tests", factory=dict)


class ComparisonPlan:
    """A plan, read and checked. Raises `SettingError` naming the key that is wrong.

    name: of the file. folder: of everything that is written.
    """

    def __init__(self, name: str, given: Mapping[str, Any]) -> None:
        known_keys("", given, [f.name for f in dataclasses.fields(PlanSettings)])
        settings = PlanSettings(**given)
        self.name, self.noise_repeats = name, settings.noise_repeats
        self.vote_tokens = settings.vote_tokens
        self.folder = Path(settings.output_dir or f"runs/{name}")
        self.seeds = seeds_of("seeds", settings.seeds)
        self.team = _team(mapping("team", settings.team))
        self.budget = _budget(settings.budget)
        self.single_agent = mapping("single_agent", settings.single_agent)
        self.prompts = [
            mapping(f"prompts[{n}]", each) for n, each in enumerate(settings.prompts or [])
        ]
        headroom = mapping("headroom", settings.headroom)
        known_keys("headroom.", headroom, [f.name for f in dataclasses.fields(HeadroomSettings)])
        self.headroom = HeadroomSettings(**headroom)
        self.arms = self._arms(mapping("arms", settings.arms))
        self._check()

    @cached_property
    def config(self) -> TeamConfig:
        """The team's settings, checked."""
        return TeamConfig(**{**self.team, "policies": self._frozen_policies()})

    @property
    def all_seeds(self) -> list[int]:
        """The plan's seeds, then those that only an arm has."""
        own = (seed for arm in self.arms.values() for seed in arm.seeds)
        return list(dict.fromkeys([*self.seeds, *own]))

    @property
    def choice_tasks(self) -> int:
        """How many tasks a method chooses by: the validation tasks, or as many as are held out
        where there are none."""
        return self.config.num_val_tasks or self.config.num_eval_tasks

    def runs(self) -> Iterator[PlannedRun]:
        """Every arm with every seed, seed by seed, so that a comparison that is stopped early has
        something of every arm."""
        for seed in self.all_seeds:
            yield from (PlannedRun(arm, seed) for arm in self.arms.values() if seed in arm.seeds)

    def settings_of(self, run: PlannedRun) -> dict[str, Any]:
        """The settings of a run: the team's, the arm's, and the plan's."""
        own, team = dict(run.arm.settings), dict(self.team)
        if run.arm.system:
            team = {name: value for name, value in team.items() if name not in OF_A_SYSTEM}
        for name in ("policies", "helpers", "agents"):
            own[name] = {**mapping(name, team.get(name)), **_merged(team, own, name)}
        return {
            **team,
            **{name: value for name, value in own.items() if value != {}},
            "output_dir": str(run.folder),
            "seed": run.seed,
            "budget": self.limits(),
            "resume": True,
        }

    def limits(self) -> dict[str, Any]:
        """The limits of the budget that are set."""
        return {name: value for name, value in to_json(self.budget).items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """What finished runs and measurements depend on, as plain JSON. Seeds and more arms may be
        added to a comparison; another team or budget makes another one."""
        return {
            "team": to_json(self.team),
            "budget": self.limits(),
            "first_seed": self.seeds[0],  # which the rows that need no arm are played with
            "arms": {name: arm.facts() for name, arm in self.arms.items()},
        }

    def headroom_identity(self) -> dict[str, Any]:
        """What the headroom test depends on, as plain JSON."""
        settings = dataclasses.asdict(self.headroom)
        return {"team": to_json(self.team), "first_seed": self.seeds[0], "headroom": settings}

    def _frozen_policies(self) -> dict[str, Any]:
        given = mapping("team.policies", self.team.get("policies"))
        return {
            name: {key: value for key, value in mapping(name, spec).items() if key != "trainable"}
            for name, spec in given.items()
        }

    def _arms(self, given: Mapping[str, Any]) -> dict[str, Arm]:
        if not given:
            raise SettingError("arms: empty; expected at least one, as NAME: {recipe: grpo_team}")
        return {name: self._arm(name, mapping(f"arms.{name}", arm)) for name, arm in given.items()}

    def _arm(self, name: Any, given: Mapping[str, Any]) -> Arm:
        where = f"arms.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SettingError(
                f"{where}: expected a name of letters, digits, '.', '-' and '_', since a folder"
                " has it too"
            )
        known_keys(f"{where}.", given, ARM_KEYS)
        settings = mapping(f"{where}.settings", given.get("settings"))
        check_arm_settings(where, settings)
        seeds = given.get("seeds")
        return Arm(
            name,
            recipe_of(where, given.get("recipe")),
            settings,
            self.seeds if seeds is None else seeds_of(f"{where}.seeds", seeds),
            str(given.get("control_of") or ""),
            Path(given.get("output_dir") or self.folder / "runs" / name),
            str(given.get("compared_with") or ""),
        )

    def _check(self) -> None:
        folders: dict[Path, str] = {}
        for arm in self.arms.values():
            own = arm.folder.resolve()
            for folder, other in folders.items():
                if own.is_relative_to(folder) or folder.is_relative_to(own):
                    raise SettingError(
                        f"arms.{arm.name}: shares the output folder {arm.folder} with {other!r};"
                        " every arm needs one of its own (leave output_dir out)"
                    )
            folders[own] = arm.name
            rest = [name for name in self.arms if name != arm.name]
            named = {"control_of": arm.control_of, "compared_with": arm.compared_with}
            for key, other_arm in named.items():
                if other_arm and other_arm not in rest:
                    raise SettingError(
                        f"arms.{arm.name}.{key}: no other arm {other_arm!r};"
                        f" {nearest(other_arm, rest)}"
                    )
        if self.prompts and not self.config.num_val_tasks:
            raise SettingError(
                "prompts: the best one is chosen on validation tasks; set team.num_val_tasks"
            )
        check_budget(self.budget, self.choice_tasks, tokens=2, calls=1)


def read_plan(path: str | Path) -> ComparisonPlan:
    """The plan in a YAML file. Raises `SettingError` that names the file."""
    try:
        return ComparisonPlan(Path(path).stem, read_yaml(Path(path)))
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error


def check_budget(budget: Budget, tasks: int, *, tokens: float, calls: float) -> None:
    """Raise `SettingError` for a budget below one evaluation of the team on `tasks` tasks.

    Args:
        tokens, calls: of one task; before anything was played the least that it can be, a call
            with a token of prompt and one of reply.
    """
    for name, limit, least in (
        ("tokens", budget.tokens, tokens * tasks),
        ("calls", budget.calls, calls * tasks),
    ):
        if limit is not None and limit < least:
            raise SettingError(
                f"budget.{name}: {limit} is below one evaluation of the team, which takes"
                f" {least:,.0f} on {tasks} tasks; give more, or fewer team.num_val_tasks"
            )


def _team(given: dict[str, Any]) -> dict[str, Any]:
    """The team's settings. The wrong ones raise `SettingError`."""
    known_keys("team.", given, [f.name for f in dataclasses.fields(RunConfig)])
    for name in given:
        if name in OF_THE_PLAN:
            raise SettingError(f"team.{name}: the plan sets it for every run; leave it out")
    return given


def _budget(given: Any) -> Budget:
    budget = Budget.of(mapping("budget", given))
    if budget == Budget():
        raise SettingError(
            "budget: missing; expected the most that a run may spend, such as {tokens: 200000}"
        )
    return budget


def _merged(team: Mapping[str, Any], own: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arm's entries of a mapping of mappings, each over the team's of that name."""
    below = mapping(name, team.get(name))
    return {
        key: {**mapping(key, below.get(key)), **mapping(key, value)}
        for key, value in mapping(name, own.get(name)).items()
    }
