"""docs/reference/: the command line, files and formats, environment and exit codes.

Written from the parsers, the dataclasses, the store's columns and docs/formats.yaml.
`python -m tests.reference_pages` writes the pages; `test_reference_pages.py` compares them with the
code and with a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from marlora.agents.state import TeamState
from marlora.agents.transcript import Operation
from marlora.agents.types import Decision, Message, Reward, Sampling, Task, Turn, Usage
from marlora.recipes.cli.main import parser
from marlora.rollouts.episodes.codec import pack
from marlora.rollouts.types import Episode
from tests.repository import ROOT

FOLDER = ROOT / "docs" / "reference"
NOTE = "<!-- written from the code by `python -m tests.reference_pages` -->"
INNER = (Decision, Operation, Message, Sampling, Usage)  # what JSON texts of a line hold
SAMPLE = Episode(
    "id", "group", Task("id", "prompt"), turns=(Turn(0, "agent", (Message("user", "prompt"),)),)
)
SAMPLE = dataclasses.replace(
    SAMPLE, rewards=(Reward("name", 1.0),), usage={"agent": Usage()}, state=TeamState()
)


def facts() -> dict[str, dict[Any, str]]:
    """By section: what docs/formats.yaml says."""
    text = (ROOT / "docs" / "formats.yaml").read_text(encoding="utf-8")
    loaded: dict[str, dict[Any, str]] = yaml.safe_load(text)
    return loaded


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, with an empty line after it."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of `marlora` by name."""
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def flag(action: argparse.Action) -> str:
    """A flag or argument as it is typed."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if not names:
        return f"`{action.metavar or action.dest.upper()}`"
    return names if action.nargs == 0 else f"{names} `{action.metavar or action.dest.upper()}`"


def default(action: argparse.Action) -> str:
    """A flag's default; "required" where it must be given."""
    if action.required and action.nargs not in ("*", argparse.REMAINDER):
        return "required"
    value = action.default
    missing = value is None or value is argparse.SUPPRESS or value in ("", False, []) or value == ()
    return "" if missing or action.nargs == 0 else f"`{value}`"


def cli_page() -> str:
    """The commands with their arguments."""
    lines = [
        NOTE,
        "# Command line",
        "",
        "`marlora COMMAND --help` prints the same. A recipe's settings, which `marlora train` takes",
        "as flags, stand in [settings](../settings.md); exit codes in [environment](environment.md).",
        "",
    ]
    for name, command in commands().items():
        lines += [f"## marlora {name}", "", " ".join((command.description or "").split()), ""]
        rows = []
        for action in command._actions:
            if isinstance(action, argparse._HelpAction) or action.help is argparse.SUPPRESS:
                continue
            text = (action.help or "") % {"default": action.default}
            if action.choices:
                text += f" (one of {', '.join(repr(str(c)) for c in action.choices)})"
            rows.append((flag(action), default(action), text))
        lines += table(("Argument", "Default", "What it is"), rows)
    return "\n".join(lines)


def columns(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and JSON types of a line's columns, those of inner objects with a dot."""
    kinds = {str: "text", int: "integer", float: "number", bool: "flag", list: "list"}
    for name, item in value.items():
        first = item[0] if isinstance(item, list) and item else item
        if isinstance(first, dict) and not name.startswith("messages"):
            yield from columns(first, f"{above}{name}.")
        else:
            yield f"{above}{name}", kinds[type(item)]


def inner(cls: type[Any]) -> list[str]:
    """A dataclass that a JSON text holds: what it is, its fields, their types and defaults."""
    lines = [f"### {cls.__name__}", "", inspect.getdoc(cls) or "", ""]
    rows = []
    for field in dataclasses.fields(cls):
        value = field.default
        shown = "required" if value is dataclasses.MISSING else f"`{value!r}`"
        if field.default_factory is not dataclasses.MISSING:
            shown = f"`{field.default_factory()!r}`"
        rows.append((f"`{field.name}`", f"`{field.type}`", shown))
    return [*lines, *table(("Field", "Type", "Default"), rows)]


def formats_page() -> str:
    """Run folder, store, checkpoint and summary, field by field."""
    known = facts()

    def named(section: str) -> list[str]:
        rows = [(f"`{name}`", text) for name, text in known[section].items()]
        return table(("Name", "What it holds"), rows)

    kinds = dict(columns(pack(SAMPLE)))
    line = [(f"`{name}`", kinds[name], text) for name, text in known["line"].items()]
    lines = [
        *(NOTE, "# Files and formats", ""),
        "Everything is JSON, YAML or safetensors; nothing is pickled. Times are seconds, log-probs",
        "nats, hashes SHA-256 in hex.",
        "",
        *("## A run folder", "", *named("files")),
        *("## A line of the store", ""),
        "`episodes/episodes-NNNNN.jsonl` holds an episode per line. Every line has the same columns",
        "of the same types, so `datasets` reads the files as they are:",
        '`datasets.load_dataset("json", data_files="RUN/episodes/episodes-*.jsonl")`.',
        "A dot stands for an inner object or list.",
        "",
        *table(("Column", "Type", "What it holds"), line),
        *(part for cls in INNER for part in inner(cls)),
        *("## learned.jsonl", "", *named("learned")),
        *("## summary.json", "", *named("summary")),
        *("## A checkpoint", "", *named("checkpoint")),
        *("### system.json", "", *named("system")),
        *("### trainer/state.json", "", *named("state")),
    ]
    return "\n".join(lines)


def environment_page() -> str:
    """Variables that are read, and exit codes."""
    known = facts()
    variables = [(f"`{name}`", text) for name, text in known["environment"].items()]
    codes = [(f"{code}", text) for code, text in known["exit_codes"].items()]
    lines = [
        *(NOTE, "# Environment and exit codes", ""),
        "No setting is taken from the environment but for keys and places:",
        "",
        *table(("Variable", "What it is"), variables),
        "`CUDA_VISIBLE_DEVICES`, the variables of `accelerate launch` and `torchrun` (`RANK`,",
        "`WORLD_SIZE`, `MASTER_PORT`, ...) and those of the Hugging Face hub (`HF_HOME`,",
        "`HF_HUB_OFFLINE`) mean what they mean elsewhere. A program of your own finds",
        "`OPENAI_BASE_URL` and `OPENAI_API_KEY` in its environment.",
        "",
        "## Exit codes",
        "",
        "Of every recipe and command:",
        "",
        *table(("Code", "What it says"), codes),
    ]
    return "\n".join(lines)


def variables_in_the_code() -> set[str]:
    """The variables of ours that the code names."""
    rooms = ("agents", "rollouts", "trainers", "recipes", "slurm")
    texts = [
        path.read_text(encoding="utf-8")
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch")
    ]
    return {name for text in texts for name in re.findall(r"\bMARLORA_[A-Z_]+\b", text)}


def pages() -> dict[str, str]:
    """By file name below docs/reference/: the text of every page."""
    return {
        "cli.md": cli_page(),
        "formats.md": formats_page(),
        "environment.md": environment_page(),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
