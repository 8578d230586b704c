"""docs/methods/RECIPE.md: a page per method, written from its docstring, its config and its settings.

`python -m tests.method_pages` writes the pages; `test_method_pages.py` compares them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

from marlora.recipes.cli.train import recipes
from marlora.trainers.config import RunConfig
from marlora.trainers.trainer import Trainer
from tests.repository import ROOT

FOLDER = ROOT / "docs" / "methods"
SHOWS = ("demo", "own_program")  # recipes that show something; their method is GRPO
NOTE = "<!-- written from the code by `python -m tests.method_pages` -->"


def methods() -> dict[str, type[Trainer[Any]]]:
    """By recipe: the trainer that it runs."""
    found = {}
    for name in recipes():
        module = importlib.import_module(f"marlora.recipes.{name}")
        (found[name],) = (
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Trainer)
        )
    return found


def row(field: dataclasses.Field[Any]) -> str:
    """A line of a table of settings: name, default, help."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory()  # type: ignore[misc]
    default = "none" if value is None else f"`{value!r}`" if value != "" else "empty"
    if len(default) > 80:
        default = f"{type(value).__name__}, see the code"
    text = " ".join(str(field.metadata["help"]).split())
    cells = [f"`{field.name}`", default, text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def own_settings(config: type[Any]) -> list[dataclasses.Field[Any]]:
    """The settings that not every method has, and those that have another default."""
    shared = {field.name: field for field in dataclasses.fields(RunConfig)}
    return [
        field
        for field in dataclasses.fields(config)
        if field.name not in shared or field.default != shared[field.name].default
    ]


def words(trainer: type[Trainer[Any]]) -> str:
    """The docstring of the trainer's module as Markdown, without its last lines, the command."""
    text = inspect.getdoc(importlib.import_module(trainer.__module__)) or ""
    text = re.split(r"\n\n(?=accelerate launch)", text)[0]
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    # what stands further in is a formula or a drawing
    return re.sub(r"((?:^(?: {2,}\S.*)\n?(?:\n(?= {2}))?)+)", r"```\n\1```\n", text, flags=re.M)


def page(recipe: str, trainer: type[Trainer[Any]]) -> str:
    """The page's text."""
    module = trainer.__module__.removeprefix("marlora.").replace(".", "/")
    names = [p.name for p in sorted((ROOT / "recipes").glob(f"{recipe}*.yaml"))]
    configs = ", ".join(f"[{name}](../../recipes/{name})" for name in names)
    lines = [
        NOTE,
        f"# {recipe}",
        "",
        recipes()[recipe] + ".",
        "",
        "```console",
        f"marlora train {recipe}",
        "```",
        "",
        f"Configs: {configs}. Code: [{module}.py](../../{module}.py). Results:"
        " [recipes/RESULTS.md](../../recipes/RESULTS.md).",
        "",
        words(trainer),
        "",
        "## Settings",
        "",
        "Those that not every method has, or that have another default here; the others stand in"
        " [settings.md](../settings.md).",
        "",
        "| Setting | Default | What it is |",
        "|---|---|---|",
        *map(row, own_settings(trainer.Config)),
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """By file name: the text of every page."""
    return {f"{name}.md": page(name, t) for name, t in methods().items() if name not in SHOWS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.md"):
        path.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
