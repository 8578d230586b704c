"""`--help`: every setting once, in its group, with default and text, and no trainer imported."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from marlora.agents.settings import Settings, setting
from marlora.recipes.cli.train import recipes
from marlora.recipes.launch.help_text import GROUP_OF, GROUPS, help_text, lines_of, lines_of_recipe
from marlora.recipes.launch.settings import parse
from marlora.rollouts.engines.config import EngineConfig
from marlora.trainers.config import AdapterSettings, RolloutSettings, RunConfig, RunSettings

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")


def shown(text: str) -> Counter[str]:
    """How often each setting stands in a help text."""
    return Counter(re.findall(r"^  --(\w+) ", text, re.M))


def test_every_setting_that_methods_share_has_a_group() -> None:
    shared = [RunSettings, RolloutSettings, AdapterSettings, EngineConfig]
    names = {field.name for cls in shared for field in fields(cls)}
    assert names == set(GROUP_OF)
    in_engine = set(GROUPS["engine"].split())
    assert {field.name for field in fields(EngineConfig)} == in_engine | {"engine"}
    assert len(GROUP_OF) == sum(len(text.split()) for text in GROUPS.values()), "named twice"


@pytest.mark.parametrize("recipe", recipes())
def test_each_setting_of_a_recipe_stands_there_once_with_a_text(recipe: str) -> None:
    lines = lines_of_recipe(recipe)
    assert all(line.help for line in lines)
    names = Counter(line.name for line in lines)
    usual = shown(help_text(recipe, "", lines, {}, ["--help"]))
    engine = shown(help_text(recipe, "", lines, {}, ["--help-engine"]))
    assert usual + engine == names and set(engine) == set(GROUPS["engine"].split())


@dataclass
class Own(Settings):
    """Settings of a method."""

    epsilon: float = setting("clip at this", 0.2)
    loss: str = setting("what is minimised", "grpo", choices=("grpo", "dapo"))


@dataclass
class Config(Own, RunConfig):
    """A config with another default than the run's."""

    max_steps: int = setting("rounds", 7)


def test_what_stands_in_the_config_is_shown_beside_the_default() -> None:
    given = {"epsilon": 0.3, "loss": "grpo", "helpers": {"a": {"url": "http://h?key=sk-1"}}}
    text = help_text("mine", "It learns.", lines_of(Config), given, ["-h"])
    assert text.startswith("marlora train mine [--config FILE]") and "\nIt learns.\n" in text
    assert "clip at this (here: 0.3; default: 0.2)" in text
    assert "--loss {grpo,dapo}\n        what is minimised (default: grpo)" in text
    assert "rounds (default: 7)" in text and shown(text)["max_steps"] == 1
    assert "sk-1" not in text and "here: set" in text
    headings = [line for line in text.splitlines() if line in GROUPS]
    assert headings == [group for group in GROUPS if group != "engine"]


def test_a_recipe_asked_for_help_prints_it_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("max_steps: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        parse(Config, tmp_path / "mine.py", ["--help"])
    assert caught.value.code == 0
    assert "rounds (here: 3; default: 7)" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_a_trainer(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("recipe: sysdpo\nmax_steps: 3\n", encoding="utf-8")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from marlora.recipes.cli.main import main
main(["train", "own.yaml", "--help"])
main(["train", "grpo_team", "--help-engine"])
assert not [name for name in sys.modules if name.startswith("marlora.trainers.methods")]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "(here: 3; default: " in done.stdout and "--server_memory" in done.stdout
