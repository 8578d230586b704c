"""`--help` of a recipe: its settings by group, each once, with what it is and what it is set to.

What the settings of our recipes are stands in `settings.json` (written from the code by `python -m
tests.settings_page`), so that help needs no import of a trainer.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlora.agents.text.secrecy import MAY_HOLD_KEYS
from marlora.agents.types import to_json
from marlora.recipes.launch.tables import terminal_width

FILE = Path(__file__).with_name("settings.json")
HELP, ENGINE = ("-h", "--help"), "--help-engine"
LEARNING = "learning"  # where a setting that no group names belongs
GROUPS: dict[str, str] = {
    "task": "tasks task_args rewards reward_timeout num_val_tasks num_eval_tasks episodes thumbs",
    "team": "system agents values helpers chat_template_kwargs",
    "policies": "model policies init lora_r lora_alpha lora_target_modules",
    LEARNING: "",
    "rollouts": (
        "engine tasks_per_step num_generations oversample temperature max_completion_length"
        " max_concurrency episode_timeout on_error max_staleness pin"
    ),
    "engine": (
        "engine_args engine_dtype server_urls server_key router_url endpoints num_servers"
        " server_host server_port server_memory server_devices server_timeout max_model_len"
        " allow_open_server"
    ),
    "keeping": (
        "output_dir seed budget save_every save_total_limit keep eval_every ablate_adapters"
        " proof_every report_to resume verbose overwrite serve_only dry_run"
    ),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


@dataclasses.dataclass(frozen=True)
class HelpLine:
    """A setting: its default as JSON, what it is, and what it may be ("" for anything)."""

    name: str
    default: Any
    help: str
    choices: str = ""


def own_lines(config: type) -> list[HelpLine]:
    """The settings that a class defines itself, in its order."""
    own = vars(config).get("__annotations__", {})
    lines = []
    for field in dataclasses.fields(config):
        if field.name in own:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            choices = field.metadata.get("metavar", "")
            text = " ".join(str(field.metadata.get("help", "")).split())
            lines.append(HelpLine(field.name, to_json(default), text, choices))
    return lines


def owners(config: type) -> list[type]:
    """The classes that define a config's settings; of two that define one, the first counts."""
    classes = [cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]
    return [cls for cls in classes if vars(cls).get("__annotations__")]


def lines_of(config: type) -> list[HelpLine]:
    """All settings of a config, those of its own first."""
    return _first([own_lines(cls) for cls in owners(config)])


def lines_of_recipe(recipe: str) -> list[HelpLine]:
    """All settings of one of our recipes, without an import of it."""
    known = json.loads(FILE.read_text(encoding="utf-8"))
    parts = [known["settings"][owner] for owner in known["recipes"][recipe]]
    return _first([[HelpLine(**line) for line in part] for part in parts])


def _first(parts: Sequence[Sequence[HelpLine]]) -> list[HelpLine]:
    lines: dict[str, HelpLine] = {}
    for part in parts:
        for line in part:
            lines.setdefault(line.name, line)
    return list(lines.values())


def wants_help(args: Sequence[str]) -> bool:
    """Whether the arguments ask for help instead of a run."""
    return any(arg in (*HELP, ENGINE) for arg in args)


def help_text(
    recipe: str,
    about: str,
    lines: Sequence[HelpLine],
    given: Mapping[str, Any],
    args: Sequence[str],
) -> str:
    """The text that `--help` or `--help-engine` among the arguments asks for.

    Args:
        recipe: as it is named on the command line.
        about: what it does.
        lines: its settings. given: what its config sets.
    """
    engine, width = ENGINE in args, terminal_width(100)
    used = f"marlora train {recipe} [--config FILE] [--SETTING VALUE] [--agents.NAME.prompt TEXT]"
    parts = [used, *textwrap.wrap(about, width)]
    for group, names in GROUPS.items():
        own = [line for line in lines if GROUP_OF.get(line.name, LEARNING) == group]
        if names:  # others keep their order, which begins with the method's own
            own.sort(key=lambda line: names.split().index(line.name))
        if own and (group == "engine") == engine:
            parts += ["", group, *(text for line in own for text in _entry(line, given, width))]
    if not engine:
        parts += ["", f"{ENGINE} shows the settings of the inference engine"]
    return "\n".join(parts)


def _entry(line: HelpLine, given: Mapping[str, Any], width: int) -> list[str]:
    """A setting as lines of text."""
    head = f"  --{line.name} {line.choices or _kind(line.default)}"
    value = f"default: {_shown(line.default)}"
    if line.name in given and given[line.name] != line.default:
        here = "set" if line.name in MAY_HOLD_KEYS else _shown(given[line.name])
        value = f"here: {here}; {value}"
    indent = " " * 8
    body = textwrap.wrap(f"{line.help} ({value})", width - len(indent), break_long_words=False)
    return [head, *(indent + text for text in body)]


def _kind(default: Any) -> str:
    """What a setting without choices takes, by its default."""
    if isinstance(default, bool):
        return "{true,false}"
    kinds = {int: "INTEGER", float: "NUMBER", str: "TEXT", list: "TEXT ...", dict: "MAPPING"}
    return kinds.get(type(default), "VALUE")


def _shown(value: Any) -> str:
    """A value as YAML has it, cut where it is long."""
    if value is None or value == "":
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return textwrap.shorten(text, 60, placeholder=" ...") if " " in text else text
