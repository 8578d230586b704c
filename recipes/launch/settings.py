"""Settings of a recipe from a YAML file and a command line; every unknown name is an error.

`python -m marlora.recipes.NAME [--config FILE] [--field value] [--agents.solver.prompt "..."]`: the
default file is the YAML beside the recipe; flags win over the file; a dotted flag sets one entry of
a mapping. Modules in the folder of a config can be imported, and a relative path in it that exists
in that folder is taken from there (`config_folder.py`); all other paths, and those of flags, begin
in the current folder.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from marlora.agents.text.secrecy import MAY_HOLD_KEYS
from marlora.agents.types import AgentSpec, PolicySpec, SettingError, nearest
from marlora.recipes.launch.config_folder import beside
from marlora.recipes.launch.help_text import help_text, lines_of, wants_help

T = TypeVar("T")

# a number with an exponent (`1e-5`), which YAML 1.1 takes for a text
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


def parse(cls: type[T], recipe: str | Path, argv: Sequence[str] | None = None) -> T:
    """Read the recipe's settings into `cls`. Raises `SettingError` naming what is wrong and the
    nearest known setting."""
    path, args = config_file(
        Path(recipe).with_suffix(".yaml"), list(sys.argv[1:] if argv is None else argv)
    )
    if wants_help(args):
        name, known_settings = Path(recipe).stem, read_yaml(path) if path.is_file() else {}
        print(help_text(name, "", lines_of(cls), known_settings, args))
        raise SystemExit(0)
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse lists every spelling of a flag
            reason = re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message)
            raise SettingError(f"{reason}; --help lists every setting")

    settings, own = read_config(path), Path(recipe)
    named = settings.pop("recipe", None)
    if named not in (None, own.stem) and own.with_stem(str(named)).is_file():
        raise SettingError(f"{path}: recipe: settings of {named!r}, but this is {own.stem!r}")
    if path.resolve().parent != own.resolve().parent:  # a config of one's own
        import_from(path.parent)
        settings = beside(settings, path.parent)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise SettingError(
                f"{path}: unknown setting {str(name)!r}; {nearest(str(name), sorted(known))}"
            )
    args = apply_paths(settings, args, known)
    parser = Parser(dataclass_types=[cls], prog=Path(recipe).stem, allow_abbrev=False)
    parser.set_defaults_with_config(**settings)
    config, rest = parser.parse_args_into_dataclasses(args=args, return_remaining_strings=True)
    if rest:
        flag = (
            rest[0].partition("=")[0]
            if rest[0].startswith("-")
            else "(not shown: no flag stands before it)"
        )
        raise SettingError(f"unknown setting {flag!r}; {nearest(flag.lstrip('-'), sorted(known))}")
    return config


def config_file(default: Path, args: Sequence[str]) -> tuple[Path, list[str]]:
    """The file named by `--config FILE` or `--config=FILE`, else the default; and the other
    arguments."""
    path, rest, queue = default, [], list(args)
    while queue:
        arg = queue.pop(0)
        if arg == "--config":
            if not queue:
                raise SettingError("--config: expected a YAML file after it")
            path = Path(queue.pop(0))
        elif arg.startswith("--config="):
            path = Path(arg.removeprefix("--config="))
        else:
            rest.append(arg)
    return path, rest


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a config. One that a run wrote also names the folders that its System and its
    rewards came from (`imports`): their modules can be imported from then on."""
    settings = read_yaml(path)
    for folder in noted_imports(settings):
        import_from(folder)
    settings.pop("imports", None)
    return settings


def noted_imports(settings: Mapping[str, Any]) -> list[Path]:
    """The folders of code of one's own that the config of a run notes, as far as they are there."""
    noted = settings.get("imports")
    folders = noted if isinstance(noted, list) else []
    return [Path(each) for each in folders if isinstance(each, str) and Path(each).is_dir()]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file. Raises `SettingError` if there is none, or it is no flat mapping."""
    import yaml

    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        raise SettingError(f"--config {path}: {error.strerror}; expected a YAML file") from error
    except yaml.MarkedYAMLError as error:  # as a text it quotes the line, which may hold a key
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = (
            "found an alias of nothing"
            if isinstance(error, yaml.composer.ComposerError)
            else error.problem
        )
        raise SettingError(
            f"{path}: not YAML: {' '.join(filter(None, (error.context, problem)))}{where}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        raise SettingError(
            f"{path}: the file is empty; expected settings, one `name: value` a line"
        )
    if not isinstance(settings, dict):
        raise SettingError(
            f"{path}: expected settings, one `name: value` a line, got a {type(settings).__name__}"
        )
    return settings


def _loader() -> Any:
    """PyYAML's safe loader, which also reads `1e-5` as a number, as YAML 1.2 does, and refuses a
    name given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} is given twice", node.start_mark
                    )
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    return Loader


def read_value(text: str) -> Any:
    """A value on the command line: a number, a flag, a list or a mapping if YAML reads one there,
    else the text as it stands.

    `Think: then answer` and `{previous}+{c}` are texts, `{a: 1}` is a mapping.
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError):
        return text
    first = text.lstrip()[:1]
    if not first:
        return text
    if isinstance(value, str):
        return value if first in ("'", '"') else text
    if isinstance(value, dict):
        return value if first == "{" and None not in value.values() else text
    if isinstance(value, list):
        return value if first == "[" else text
    # YAML would read dates, and 1:30 as a number to the base 60
    return (
        value
        if value is None or (isinstance(value, (bool, int, float)) and ":" not in text)
        else text
    )


def apply_paths(settings: dict[str, Any], args: Sequence[str], known: set[str]) -> list[str]:
    """Move `--a.b.c VALUE` (or `=VALUE`) from the arguments into the settings, see `read_value`.
    Returns the other arguments.

    A field of an agent or a policy that is a text, such as a prompt, is taken as it stands.
    """
    rest: list[str] = []
    heads: set[str] = set()
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
        if not all(path):
            raise SettingError(
                f"{flag}: expected names between the dots, such as --agents.solver.prompt"
            )
        heads.add(head)
        _put(settings, flag, [head, *path], value if _is_text(head, path) else read_value(value))
    for arg in rest:
        if arg.partition("=")[0].removeprefix("--") in heads:
            raise SettingError(f"{arg.partition('=')[0]}: given as a whole and by path; choose one")
    return rest


def _put(settings: dict[str, Any], flag: str, path: Sequence[str], value: Any) -> None:
    place: Any = settings
    for number, key in enumerate(path[:-1]):
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            value_ = f"a {type(place).__name__}" if path[0] in MAY_HOLD_KEYS else repr(place)
            raise SettingError(
                f"{flag}: {'.'.join(path[: number + 1])} is {value_}, so nothing can be set inside"
                " it"
            )
    place[path[-1]] = value


def _is_text(head: str, path: Sequence[str]) -> bool:
    of = {"agents": AgentSpec, "policies": PolicySpec}.get(head)
    return (
        of is not None and len(path) == 2 and get_type_hints(of).get(path[1]) in (str, str | None)
    )


def run(main: Callable[[], Any]) -> None:
    """Run a recipe's `main`, in as many processes as its devices ask for; exit codes as of
    `exit_with_code`."""
    from marlora.recipes.launch.processes import start_all
    from marlora.trainers.distributed.ranks import RankError

    def work() -> None:
        import_from_here()
        try:
            main()
        except RankError:  # rank 0 has printed why
            raise SystemExit(1) from None

    exit_with_code(
        work,
        start=start_all,
        interrupted="interrupted: go on from the newest checkpoint with --resume true",
    )


def import_from_here() -> None:
    """Let modules of the current folder be imported, as `python -m` does: a script or a console
    command has its own folder on the path instead. Not under `python -P`."""
    if "" not in sys.path:
        import_from(Path.cwd())


def import_from(folder: Path) -> None:
    """Let modules of a folder be imported. Not under `python -P`."""
    path = str(folder.absolute())
    if not sys.flags.safe_path and path not in sys.path:
        sys.path.insert(0, path)


def print_any_text() -> None:
    """Let stdout take any text, as stderr does: a character that the terminal's encoding lacks is
    written as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def exit_with_code(
    work: Callable[[], Any], *, interrupted: str, start: Callable[[], Any] = lambda: None
) -> None:
    """Call `start` and `work`. Exit codes of every recipe and command: 0 success, 1 a run that
    failed (one clear line on stderr) or was stopped, 2 wrong usage.

    `start` runs with the signal handlers that the process was started with. `interrupted`: the line
    after Ctrl-C.
    """
    from marlora.rollouts.engines.base import EngineError
    from marlora.rollouts.episodes.store import StoreError
    from marlora.trainers.collection.background import stoppable
    from marlora.trainers.errors import RunError, Stopped

    print_any_text()
    try:
        start()
        with stoppable():
            work()
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (RunError, EngineError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Stopped:
        print("stopped: the last finished step is saved; go on with --resume true", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(1) from None
