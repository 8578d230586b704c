"""`marlora train` and `marlora recipes`: every recipe under one command, by name or by config."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from marlora.agents.types import SettingError, nearest
from marlora.recipes.cli.checkpoint.team import add_json, show, write_json
from marlora.recipes.launch.help_text import help_text, lines_of_recipe, wants_help
from marlora.recipes.launch.settings import config_file, read_yaml
from marlora.recipes.launch.tables import table

FOLDER = Path(__file__).resolve().parents[1]
HERE = "config.yaml"  # what is trained in a folder of one's own
RECIPE = "recipe"  # the entry of a config that names what it is a config of


def configs() -> dict[str, Path]:
    """By name: the configs beside the recipes, the recipes' own among them."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipes() -> dict[str, str]:
    """By name: the first sentence of every recipe, without an import of any."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if any(name.startswith(path.stem) for name in configs()):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            sentence, _, _ = " ".join(text.split("\n\n")[0].split()).partition(". ")
            found[path.stem] = sentence.rstrip(".")
    return found


def recipe_of(config: Path) -> str:
    """The recipe that a config is for. Raises `SettingError` unless it names one."""
    known = recipes()
    name = read_yaml(config).get(RECIPE)
    if name is None and config.resolve().parent == FOLDER:  # its name begins with the recipe's
        name = max((each for each in known if config.stem.startswith(each)), key=len)
    if name is None:
        raise SettingError(
            f"{config}: which recipe is it for? Add a line such as `{RECIPE}: grpo_team`; `marlora"
            " recipes` lists them"
        )
    if name not in known:
        raise SettingError(f"{config}: {RECIPE}: no such recipe {name!r}; {nearest(name, known)}")
    return str(name)


def chosen(name: str) -> tuple[str, Path | None]:
    """The recipe that a name or a config file stands for, and the config if it is not the
    recipe's own. Raises `SettingError` if there is none."""
    known, ours = recipes(), configs()
    if name in known:
        return name, None
    if name in ours:
        return recipe_of(ours[name]), ours[name]
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        path /= "config.yaml"
    if path.suffix in (".yaml", ".yml") or path.exists():
        return recipe_of(path), path
    raise SettingError(
        f"train {name!r}: no such recipe or config file; {nearest(name, [*known, *ours])}"
    )


def cmd_train(args: argparse.Namespace) -> None:
    """Train by a recipe (`marlora recipes` lists them) or by a config that names one; further
    arguments are its settings: --field value, --agents.NAME.prompt "...", --help."""
    if args.recipe == HERE and not Path(HERE).is_file():
        raise SettingError(
            f"train: name a recipe (`marlora recipes` lists them) or a config; there is no {HERE}"
            " in this folder"
        )
    name, config = chosen(args.recipe)
    given = list(args.settings)
    if wants_help(given):
        print_help(args.recipe, name, config, given)
        return
    _, rest = config_file(Path(), given)
    if config is not None and rest != given:
        raise SettingError(f"train {args.recipe}: it is a config, so leave --config out")
    if config is not None:
        given = ["--config", str(config), *given]
    sys.argv = [f"marlora train {args.recipe}", *given]
    importlib.import_module(f"marlora.recipes.{name}").main()


def print_help(shown: str, name: str, config: Path | None, given: Sequence[str]) -> None:
    """The settings of a recipe and what its config, or the one that `--config` names, sets. Imports
    no trainer."""
    path, _ = config_file(config or FOLDER / f"{name}.yaml", given)
    settings = read_yaml(path) if path.is_file() else {}
    lines = lines_of_recipe(name)
    print(help_text(shown, f"{recipes()[name]}.", lines, settings, given))


def with_recipe(argv: Sequence[str]) -> list[str]:
    """The arguments of `marlora`; `train` without a recipe means the config of this folder."""
    command, first = list(argv[:1]), argv[1:2]
    unnamed = not first or (first[0].startswith("-") and not wants_help(first))
    return ["train", HERE, *argv[1:]] if command == ["train"] and unnamed else list(argv)


def add_train(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora train`."""
    command.add_argument(
        "recipe",
        help=f"name of a recipe, a YAML file, or a run folder; {HERE} of this folder if not given",
    )
    command.add_argument("settings", nargs=argparse.REMAINDER, help="settings of the recipe")


def cmd_recipes(args: argparse.Namespace) -> None:
    """List the recipes; or copy the config of one into this folder, to change it."""
    if args.copy:
        copy(args.copy, Path(f"{args.copy}.yaml"))
        return
    known = recipes()
    others = [
        (name, f"settings of {recipe_of(p)}") for name, p in configs().items() if name not in known
    ]
    columns = ("marlora train ...", "what it does")
    show(args.json, table("marlora recipes", columns, [*known.items(), *others], words=True))
    write_json(
        args.json, {"recipes": known, "configs": {n: recipe_of(configs()[n]) for n, _ in others}}
    )


def copy(name: str, to: Path) -> None:
    """Write a config of ours to a new file that `marlora train FILE` takes."""
    ours = configs()
    if name not in ours:
        raise SettingError(f"recipes --copy {name}: no such recipe; {nearest(name, ours)}")
    text, line = ours[name].read_text(encoding="utf-8"), f"{RECIPE}: {recipe_of(ours[name])}\n"
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text if line in text.splitlines(keepends=True) else line + text)
    except FileExistsError as error:
        raise SettingError(f"{to}: exists already; copy from another folder") from error
    print(f"{to}: change it, then run: marlora train {to}")


def add_recipes(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora recipes`."""
    command.add_argument("--copy", default="", metavar="NAME", help="write NAME.yaml here")
    add_json(command)
