"""Paths in a config: beside it where they exist there, else in the current folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.types import Task
from marlora.recipes.launch.config_folder import beside
from marlora.recipes.launch.settings import noted_imports, parse
from marlora.trainers.loop.summary import code_folders


@dataclass
class Config:
    """Settings of a recipe that reads two files."""

    tasks: str = field(default="arithmetic", metadata={"help": "task set"})
    model: str = field(default="", metadata={"help": "base"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config's folder with data and models, which is not the current one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    mine = tmp_path / "mine"
    for name in ("data", "base", "tiny", "fresh", "run/checkpoints/step-000001"):
        (mine / name).mkdir(parents=True)
    return mine


def test_what_lies_beside_the_config_is_meant(folder: Path) -> None:
    step = "run/checkpoints/step-000001"
    given: dict[str, Any] = {
        "tasks": "data",
        "model": "base",
        "init": step,
        "policies": {"a": {"init": f"{step}#a", "base": "base", "url": "base"}, "b": None},
        "helpers": {"judge": {"base": "base", "prompt": "data"}},
        "task_args": {"path": "data", "extract": "data"},
        "output_dir": "run",
    }
    at = {name: str(folder / name) for name in ("data", "base", step)}
    assert beside(given, folder) == {
        "tasks": at["data"],
        "model": at["base"],
        "init": at[step],
        "policies": {"a": {"init": f"{at[step]}#a", "base": at["base"], "url": "base"}, "b": None},
        "helpers": {"judge": {"base": at["base"], "prompt": "data"}},
        "task_args": {"path": at["data"], "extract": "data"},
        "output_dir": "run",
    }


def test_all_else_is_left_as_it_is(folder: Path) -> None:
    given = {
        "tasks": "nowhere.jsonl",  # not beside the config: in the current folder, if anywhere
        "model": "tiny",  # a short name, although a folder is called so
        "policies": {"a": {"init": "fresh"}},
        "init": "\0",
        "episodes": "x" * 5000,
        "task_args": None,
    }
    assert beside(given, folder) == given
    assert beside({"model": str(folder / "base")}, folder) == {"model": str(folder / "base")}


def test_flags_begin_in_the_current_folder_and_the_configs_modules_can_be_imported(
    folder: Path,
) -> None:
    (folder / "own.yaml").write_text("tasks: data\nmodel: base\n", encoding="utf-8")
    config = parse(Config, "recipes/x.py", ["--config", str(folder / "own.yaml")])
    assert config == Config(str(folder / "data"), str(folder / "base"))
    flags = ["--config", str(folder / "own.yaml"), "--tasks", "data"]
    assert parse(Config, "recipes/x.py", flags).tasks == "data"
    assert sys.path[0] == str(folder)


def test_a_recipes_own_config_is_taken_as_it_is(folder: Path) -> None:
    (folder / "x.yaml").write_text("tasks: data\n", encoding="utf-8")
    before = list(sys.path)
    assert parse(Config, folder / "x.py", []).tasks == "data" and sys.path == before


def test_a_run_notes_the_folders_of_code_of_ones_own(folder: Path) -> None:
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inside.py").write_text("class Team: ...\n", encoding="utf-8")
    (folder / "alone.py").write_text("def reward(): ...\n", encoding="utf-8")
    sys.path.insert(0, str(folder))
    import alone  # type: ignore[import-not-found]
    import package.inside as inside  # type: ignore[import-not-found]

    try:
        assert code_folders([alone.reward, inside.Team, Task, yaml.Loader]) == [str(folder)]
        assert code_folders([Task, pytest.raises, Path]) == []
    finally:
        for name in ("alone", "package", "package.inside"):
            del sys.modules[name]

    config = {"recipe": "x", "imports": [str(folder / "data")], "model": "base"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    parse(Config, "recipes/x.py", ["--config", str(folder / "config.yaml")])
    assert str(folder / "data") in sys.path
    for odd in (5, "data", [5], {"a": "b"}, ["/nowhere"], None):
        assert noted_imports({"imports": odd}) == []
