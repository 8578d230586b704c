"""The `marlora` command: look at, talk to, serve and measure trained teams."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from marlora.agents.types import SettingError
from marlora.recipes.cli.bench import add_bench, cmd_bench
from marlora.recipes.cli.cache import add_cache, cmd_cache
from marlora.recipes.cli.checkpoint.collect import add_collect, cmd_collect
from marlora.recipes.cli.checkpoint.evaluate import add_eval, cmd_eval
from marlora.recipes.cli.checkpoint.export import add_export, cmd_export
from marlora.recipes.cli.checkpoint.play import add_play, cmd_play
from marlora.recipes.cli.checkpoint.serve import cmd_serve
from marlora.recipes.cli.checkpoint.team import (
    add_json,
    add_model,
    add_team,
    import_folders,
    show,
    write_json,
)
from marlora.recipes.cli.compare import add_compare, cmd_compare
from marlora.recipes.cli.init import add_init, cmd_init
from marlora.recipes.cli.report import add_report, cmd_report
from marlora.recipes.cli.slurm import add_slurm, cmd_slurm
from marlora.recipes.cli.train import add_recipes, add_train, cmd_recipes, cmd_train, with_recipe
from marlora.recipes.launch.help_text import wants_help
from marlora.recipes.launch.settings import exit_with_code, import_from, import_from_here, run
from marlora.recipes.launch.tables import table
from marlora.trainers.errors import RunError
from marlora.trainers.monitoring.library_output import silence_libraries


def cmd_doctor(args: argparse.Namespace) -> None:
    """What this machine can do for marlora, and how to fix what is missing."""
    from marlora.recipes.cli.doctor import examine

    rows, broken = examine(args.model, args.server_urls)
    columns = ("part", "found", "what to do")
    show(args.json, table("marlora doctor", columns, rows, words=True))
    parts = [dict(zip(("part", "found", "todo"), row, strict=True)) for row in rows]
    write_json(args.json, {"parts": parts, "broken": broken})
    if broken:
        raise RunError(f"doctor: training cannot work here: {', '.join(broken)}")


class _Parser(argparse.ArgumentParser):
    """Names the flags that it does not know, without their values: one may be a key."""

    def error(self, message: str) -> NoReturn:
        head, unknown, rest = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in rest.split() if word.startswith("-")]
        super().error(
            f"{head}{unknown}{' '.join(flags) or '(not shown: no flag stands before them)'}"
            if unknown
            else message
        )


def parser() -> argparse.ArgumentParser:
    """The parser of `marlora` and its commands."""
    top = _Parser(prog="marlora", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    top.add_argument(
        "--version", action="version", version=f"marlora {metadata.version('marlora')}"
    )
    for name, (work, add) in _commands().items():
        command = commands.add_parser(
            name,
            help=(work.__doc__ or "").split(";")[0].strip(),
            description=work.__doc__,
            allow_abbrev=False,
        )
        command.set_defaults(run_command=work)
        add(command)
    return top


def add_doctor(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora doctor`."""
    add_model(command, "a model whose chat template is to be tried, besides those in the cache")
    command.add_argument(
        "--server_urls",
        nargs="+",
        default=[],
        help="servers that others run: tries what they answer without a key",
    )
    add_json(command)


def _commands() -> dict[str, tuple[Callable[..., None], Callable[..., None]]]:
    """By name: what a command does, and what adds its arguments."""
    return {
        "train": (cmd_train, add_train),
        "recipes": (cmd_recipes, add_recipes),
        "init": (cmd_init, add_init),
        "eval": (cmd_eval, add_eval),
        "compare": (cmd_compare, add_compare),
        "collect": (cmd_collect, add_collect),
        "play": (cmd_play, add_play),
        "serve": (cmd_serve, add_team),
        "report": (cmd_report, add_report),
        "export": (cmd_export, add_export),
        "bench": (cmd_bench, add_bench),
        "slurm": (cmd_slurm, add_slurm),
        "cache": (cmd_cache, add_cache),
        "doctor": (cmd_doctor, add_doctor),
    }


def _names_code(args: argparse.Namespace) -> bool:
    """Whether the user consents to code outside marlora. Without that the current folder, which may
    be a stranger's checkpoint, is not put on the import path."""
    tasks = getattr(args, "tasks", "")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    names += [name for name in getattr(args, "rewards", None) or [] if "://" not in name]
    given = getattr(args, "system", "") or getattr(args, "trust_checkpoint", False)
    return bool(given) or any(":" in name for name in names)


@contextlib.contextmanager
def _code_of_the_run(args: argparse.Namespace) -> Iterator[None]:
    """Let code be imported from where the runs of the checkpoints had it, if they are trusted; if
    not, say where that is when it is missing."""
    given = getattr(args, "checkpoint", [])
    checkpoints = given if isinstance(given, list) else [given]
    trusted = getattr(args, "trust_checkpoint", False)
    for folder in import_folders(checkpoints) if trusted else ():
        import_from(folder)
    try:
        yield
    except SettingError as error:
        if trusted or "cannot be imported" not in str(error):
            raise
        where = " and ".join(map(str, import_folders(checkpoints)))
        hint = f". The run had it from {where}: go there, or give --trust_checkpoint"
        raise SettingError(f"{error}{hint if where else ''}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `marlora`."""
    args = parser().parse_args(with_recipe(sys.argv[1:] if argv is None else argv))

    if args.command == "train" and not wants_help(args.settings):
        run(partial(args.run_command, args))  # signals, processes and exit codes as of a recipe
        return

    def work() -> None:
        if getattr(args, "json", "") and not Path(args.json).absolute().parent.is_dir():
            raise SettingError(f"--json {args.json}: no such folder")
        silence_libraries()
        if _names_code(args):
            import_from_here()
        with _code_of_the_run(args):
            args.run_command(args)

    exit_with_code(work, interrupted="stopped")


if __name__ == "__main__":
    main()
