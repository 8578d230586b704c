"""The arms of a comparison: recipes with settings, seeds and controls, and what an arm may change
of the plan's team."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlora.agents.settings import mapping
from marlora.agents.types import SettingError, nearest, to_json

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of an arm: it names a folder
# settings that a run has from the plan, so that neither team nor arm may have them
OF_THE_PLAN = {
    "output_dir",
    "seed",
    "budget",
    "resume",
    "overwrite",
    "serve_only",
    "dry_run",
    "episodes",  # learning from what another run has paid for is outside of every budget
}
# settings of the team that no arm may change: what is played and what is measured are the same
OF_THE_TEAM = {
    "model",
    "init",
    "tasks",
    "task_args",
    "rewards",
    "num_eval_tasks",
    "num_val_tasks",
    "max_completion_length",
    "chat_template_kwargs",
}
# what an arm may change of a policy, and of an agent: whether agents share weights is a method's.
# An arm with a system of its own (a method whose structure is new) has agents of its own, and may
# name the models that they are.
OF_A_POLICY = ("trainable", "adapter", "learning_rate")
OF_AN_AGENT = ("policy",)
OF_A_SYSTEM = ("agents", "values")


@dataclass(frozen=True)
class Arm:
    """A recipe with settings, run once for each seed.

    control_of: the arm whose control it is, "" for none. compared_with: another arm that it is set
    against, seed by seed. folder: holds a run folder per seed.
    """

    name: str
    recipe: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    control_of: str
    folder: Path
    compared_with: str = ""

    @property
    def system(self) -> str:
        """The class of the arm's own system, "" if it plays the team's."""
        return str(mapping("system", self.settings.get("system")).get("class") or "")

    def facts(self) -> dict[str, Any]:
        """What a finished run of this arm depends on, beside the plan's team and budget."""
        return {"recipe": self.recipe, "settings": to_json(dict(self.settings))}


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    arm: Arm
    seed: int

    @property
    def folder(self) -> Path:
        return self.arm.folder / f"seed-{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


def recipe_of(where: str, name: Any) -> str:
    """A recipe of marlora by name, or a file."""
    text = str(name or "")
    if text.endswith(".py"):
        if Path(text).is_file():
            return text
        raise SettingError(f"{where}.recipe: no file {text!r}")
    if re.fullmatch(r"\w+", text) and importlib.util.find_spec(f"marlora.recipes.{text}"):
        return text
    raise SettingError(f"{where}.recipe: no recipe {text!r}; {nearest(text, _recipes())}")


def _recipes() -> list[str]:
    folder = Path(__file__).parent.parent
    return sorted(path.stem for path in folder.glob("*.py"))


def check_arm_settings(where: str, given: Mapping[str, Any]) -> None:
    """Raise `SettingError` if an arm changes what is asked or measured."""
    own_system = "system" in given
    if own_system and not mapping(f"{where}.settings.system", given["system"]).get("class"):
        raise SettingError(
            f"{where}.settings.system: expected the class of the arm's own system; without one the"
            " arm has the team's"
        )
    for name in given:
        if name in OF_THE_PLAN | OF_THE_TEAM:
            owner = "team" if name in OF_THE_TEAM else "plan"
            raise SettingError(
                f"{where}.settings.{name}: is the {owner}'s, the same for every arm; leave it out"
            )
    if "values" in given and not own_system:
        raise SettingError(
            f"{where}.settings.values: are the team's; only an arm with a system of its own has"
            " others"
        )
    of_an_agent = [("agents", OF_AN_AGENT)] if not own_system else []
    of_a_policy = (*OF_A_POLICY, "base") if own_system else OF_A_POLICY
    for key, allowed in [("policies", of_a_policy), *of_an_agent]:
        for name, spec in mapping(f"{where}.settings.{key}", given.get(key)).items():
            known_keys(f"{where}.settings.{key}.{name}.", mapping(name, spec), allowed)


def seeds_of(where: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given:
        raise SettingError(f"{where}: expected a list of whole numbers, got {given!r}")
    for seed in given:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise SettingError(f"{where}: expected whole numbers from 0, got {seed!r}")
        if given.count(seed) > 1:
            raise SettingError(f"{where}: {seed} is listed twice; a second run would be the first")
    return tuple(given)


def known_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise `SettingError` for a key that is not known."""
    for key in given:
        if key not in known:
            raise SettingError(f"{where}{key}: unknown setting; {nearest(str(key), known)}")
