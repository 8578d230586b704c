"""From a YAML file and a command line to a config, with every unknown name an error.

`python -m marlora.recipes.NAME [--config FILE] [--field value] [--agents.solver.prompt "..."]`: the default file is the YAML beside
the recipe; flags win over the file; a dotted flag sets one entry of a mapping.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from marlora.agents.types import SettingError, nearest

T = TypeVar("T")


def parse(cls: type[T], recipe: str | Path, argv: Sequence[str] | None = None) -> T:
    """Read the recipe's settings into `cls`. Raises `SettingError` naming what is wrong and the nearest known setting."""
    import yaml
    from trl import TrlParser

    args = list(sys.argv[1:] if argv is None else argv)
    path = Path(recipe).with_suffix(".yaml")
    if "--config" in args:
        at = args.index("--config")
        if at + 1 >= len(args):
            raise SettingError("--config: expected a YAML file after it")
        path = Path(args[at + 1])
        del args[at : at + 2]
    if not path.is_file():
        raise SettingError(f"--config {path}: no such file")
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise SettingError(f"{path}: expected a flat mapping of settings, got {type(settings).__name__}")
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    args = apply_paths(settings, args, known)
    for name in settings:
        if name not in known:
            raise SettingError(f"{path}: unknown setting {name!r}; {nearest(str(name), sorted(known))}")
    parser = TrlParser(dataclass_types=[cls], prog=Path(recipe).stem, allow_abbrev=False)
    parser.set_defaults_with_config(**settings)
    config, rest = parser.parse_args_into_dataclasses(args=args, return_remaining_strings=True)
    if rest:
        raise SettingError(f"unknown setting {rest[0]!r}; {nearest(rest[0].lstrip('-').split('=')[0], sorted(known))}")
    return config


def apply_paths(settings: dict[str, Any], args: list[str], known: set[str]) -> list[str]:
    """Move `--a.b.c VALUE` (or `=VALUE`) from the arguments into the settings; VALUE is read as YAML. Returns the other arguments."""
    import yaml

    rest: list[str] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        flag, equals, value = arg.partition("=")
        if not (flag.startswith("--") and "." in flag):
            rest.append(arg)
            continue
        if not equals:
            if not queue:
                raise SettingError(f"{flag}: expected a value after it")
            value = queue.pop(0)
        head, *path = flag[2:].split(".")
        if head not in known:
            raise SettingError(f"unknown setting {flag!r}; {nearest(head, sorted(known))}")
        place = settings.setdefault(head, {})
        for key in path[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise SettingError(f"{flag}: {head} is no mapping on that path")
        place[path[-1]] = yaml.safe_load(value)
    return rest


def run(main: Callable[[], Any]) -> None:
    """Exit codes of every recipe: 0 success, 1 a run that failed (one clear line on stderr), 2 wrong usage."""
    from marlora.trainers.run import RunError

    try:
        main()
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("stopped: the last finished step is saved; go on with --resume true", file=sys.stderr)
        raise SystemExit(1) from None
