"""docs/settings.md and recipes/launch/settings.json: every setting of every method, written from the
configs themselves.

`python -m tests.settings_page` writes both; `test_settings_page.py` compares them.
"""

from __future__ import annotations

import dataclasses
import json

from marlora.recipes.launch import help_text
from tests.method_pages import methods as trainers
from tests.method_pages import row
from tests.repository import ROOT

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every setting of every method: a key of its YAML file and a flag (`--NAME VALUE`) of its recipe. A method has the settings of the groups
that stand behind its name; where it has another default than the group, its own table says so. This page is written from the code by
`python -m tests.settings_page`.
"""


def page() -> str:
    """The page's text: methods with their groups, then a table for each group."""
    methods, groups = [], {}
    configs = list(dict.fromkeys(trainer.Config for trainer in trainers().values()))
    for config in configs:
        name, module = config.__name__, config.__module__
        owners = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
        owners = [c for c in owners if set(vars(c).get("__annotations__", {}))]
        methods.append(f"- `{name}` ({module}): " + ", ".join(f"`{c.__name__}`" for c in owners))
        for owner in owners:
            groups.setdefault(owner.__name__, owner)
    lines = [HEAD, *methods]
    for name in sorted(groups):
        owner = groups[name]
        own = vars(owner)["__annotations__"]
        fields = [field for field in dataclasses.fields(owner) if field.name in own]
        lines += ["", f"## {name}", "", "| Setting | Default | What it is |", "|---|---|---|"]
        lines += [row(field) for field in fields]
    return "\n".join(lines) + "\n"


def help_file() -> str:
    """What `--help` reads: the settings of each class, and the classes of each recipe."""
    settings, recipes = {}, {}
    for recipe, trainer in sorted(trainers().items()):
        classes = help_text.owners(trainer.Config)
        recipes[recipe] = [cls.__name__ for cls in classes]
        for cls in classes:
            settings[cls.__name__] = [dataclasses.asdict(line) for line in help_text.own_lines(cls)]
    known = {"recipes": recipes, "settings": dict(sorted(settings.items()))}
    return json.dumps(known, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    help_text.FILE.write_text(help_file(), encoding="utf-8")
