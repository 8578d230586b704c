"""docs/methods.md, docs/methods/RECIPE.md and its picture: a page per method and a table of all.

Written from the method's docstring, config and settings, and from docs/methods.yaml, which quotes
recipes/RESULTS.md. `python -m tests.method_pages` writes them; `test_method_pages.py` compares.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from marlora.recipes.cli.train import recipes
from marlora.trainers.config import RunConfig
from marlora.trainers.trainer import Trainer
from tests.method_drawing import drawing
from tests.repository import ROOT

FOLDER = ROOT / "docs" / "methods"
TABLE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "recipes" / "RESULTS.md"
SHOWS = ("demo", "own_program")  # recipes that show something; their method is GRPO
NOTE = "<!-- written from the code by `python -m tests.method_pages` -->"
BEGIN, END = "<!-- table of methods -->", "<!-- end of the table -->"
NO_MODEL = "with scripted helpers only, so far"  # the result of a method that no model has run
SPLIT = re.compile(
    r"Against\s+the\s+(?:paper|authors'\s+code)|Authors'\s+code:"
    r"|There\s+is\s+no\s+code\s+by\s+the\s+authors|The\s+library\s+has\s+its\s+own\s+loop"
)


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


def facts() -> dict[str, dict[str, Any]]:
    """By recipe: what docs/methods.yaml says of the method, in the order of the table."""
    text = (ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = yaml.safe_load(text)
    order = list(dict.fromkeys(fact["group"] for fact in known.values()))
    return dict(sorted(known.items(), key=lambda item: order.index(item[1]["group"])))


def config_path(recipe: str) -> Path:
    """The config that a recipe takes where none is named: its own, or the one its script names."""
    script = (ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8")
    named = re.search(r'with_name\("(\w+\.yaml)"\)', script)
    return ROOT / "recipes" / (named[1] if named else f"{recipe}.yaml")


def config_of(recipe: str) -> dict[str, Any]:
    """The settings of that config."""
    loaded: dict[str, Any] = yaml.safe_load(config_path(recipe).read_text(encoding="utf-8"))
    return loaded


def row(field: dataclasses.Field[Any]) -> str:
    """A line of a table of settings: name, default, help."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory()  # type: ignore[operator]
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


def words(trainer: type[Trainer[Any]]) -> tuple[str, str]:
    """The docstring of the trainer's module as Markdown, without the command at its end: what the
    method is, and how it differs from the paper or its code ("" if nothing is said)."""
    text = inspect.getdoc(importlib.import_module(trainer.__module__)) or ""
    text = re.split(r"\n\n(?=accelerate launch)", text)[0]
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    # a paragraph that stands further in is a formula or a drawing
    text = re.sub(
        r"(?<=\n\n)((?:^(?: {2,}\S.*)\n?(?:\n(?= {2}))?)+)", r"```\n\1```\n", text, flags=re.M
    )
    found = SPLIT.search(text)
    return (text[: found.start()].strip(), text[found.start() :]) if found else (text, "")


def paper(fact: dict[str, Any]) -> str:
    """The paper as a link; "" if there is none."""
    number = fact.get("paper")
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def gpu(trainer: type[Trainer[Any]]) -> str:
    """What a GPU is needed for."""
    return "to train" if trainer.Config.trains_weights else "to serve"


def section_link(where: str, folder: str) -> str:
    """A link to the section of RESULTS.md whose heading begins so, seen from a folder of docs."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.search(rf"^#+ ({re.escape(where)}.*)$", text, re.M)
    assert found, f"docs/methods.yaml: RESULTS.md has no section that begins {where!r}"
    anchor = re.sub(r"[^\w\- ]", "", found[1].lower()).replace(" ", "-")
    return f"[{where}]({folder}recipes/RESULTS.md#{anchor})"


def run_it(recipe: str, fact: dict[str, Any]) -> list[str]:
    """The command, what to expect of it, and what did not work."""
    command = fact.get("command", f"marlora train {recipe}")
    lines = ["## Run it", "", "```console", command, "```", ""]
    if "result" not in fact:
        return [*lines, f"Measured {NO_MODEL}: no trained model has run it.", ""]
    where = ", ".join(section_link(each, "../../") for each in fact["where"])
    got = f"Measured by `{fact['measured']}`" if "measured" in fact else "Expected, held out"
    lines += [f"{got}: {fact['result']}. Sections of the results: {where}.", ""]
    return [*lines, "## What did not work", "", fact["failed"], ""]


def page(recipe: str, trainer: type[Trainer[Any]], fact: dict[str, Any]) -> str:
    """The page's text."""
    module = trainer.__module__.removeprefix("marlora.").replace(".", "/")
    names = [p.name for p in sorted((ROOT / "recipes").glob(f"{recipe}*.yaml"))]
    configs = ", ".join(f"[{name}](../../recipes/{name})" for name in names)
    detail, differences = words(trainer)
    idea = fact.get("idea", detail).strip()
    name = fact["name"]
    title = name if re.match("[a-z]+[A-Z]", name) else name[0].upper() + name[1:]
    about = [
        f"Recipe `{recipe}`",
        f"changes {fact['changes']}",
        f"needs {fact['needs']}",
        f"a GPU {gpu(trainer)} models above 135M parameters",
        *([f"paper arXiv {paper(fact)}"] if "paper" in fact else []),
    ]
    lines = [
        *(NOTE, f"# {title}", "", recipes()[recipe] + ".", "", "; ".join(about) + ".", ""),
        *("## Idea", "", idea, "", "## Formula", "", "```text", fact["formula"].rstrip(), "```"),
        *("", "## The way of the data", ""),
        *(f"![Tasks, team, rewards, store, method and state](images/{recipe}.svg)", ""),
        *(f"What it costs: {fact['cost']}.", ""),
        *run_it(recipe, fact),
        f"Configs: {configs}. Code: [{module}.py](../../{module}.py).",
        "",
        *(["## In detail", "", detail, ""] if "idea" in fact else []),
        *(["## Differences from the paper", "", differences, ""] if differences else []),
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


def table() -> str:
    """The table of all methods, for docs/methods.md."""
    trainers, group = methods(), ""
    head = ("Method", "Changes", "Our result, held out", "Needs", "GPU", "Costs", "Paper", "Recipe")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe, fact in facts().items():
        if fact["group"] != group:
            group = fact["group"]
            lines.append(f"| **{group}** " + "| " * (len(head) - 1) + "|")
        cells = [
            f"[{fact['name']}](methods/{recipe}.md)",
            *(fact["changes"], fact.get("result", NO_MODEL), fact["needs"], gpu(trainers[recipe])),
            *(fact["cost"], paper(fact), f"`{recipe}`"),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def with_table(document: str) -> str:
    """docs/methods.md with the table of today."""
    before, _, rest = document.partition(f"{BEGIN}\n")
    return f"{before}{BEGIN}\n{table()}{END}\n{rest.partition(f'{END}{chr(10)}')[2]}"


def pages() -> dict[str, str]:
    """By path below docs/methods/: the text of every page and picture."""
    known, found = facts(), {}
    for name, trainer in methods().items():
        if name in SHOWS:
            continue
        assert name in known, f"docs/methods.yaml says nothing of {name}"
        fact = known[name]
        found[f"{name}.md"] = page(name, trainer, fact)
        trains = trainer.Config.trains_weights
        found[f"images/{name}.svg"] = drawing(
            fact["name"], fact["changes"], config_of(name), trains
        )
    return found


if __name__ == "__main__":
    texts = pages()
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in (*FOLDER.glob("*.md"), *FOLDER.glob("images/*.svg")):
        if str(path.relative_to(FOLDER)) not in texts:
            path.unlink()
    TABLE.write_text(with_table(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
