"""`marlora report`: the page of a run, of several side by side, or of one that is still running."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint.team import add_json, add_model, locate, say, show, write_json
from marlora.recipes.launch.tables import spent_lines, table
from marlora.rollouts.renderer import load_tokenizer
from marlora.rollouts.report.episode_index import MAX_EPISODES, Pieces
from marlora.rollouts.report.live import LiveReport
from marlora.rollouts.report.report import numbers_of, read_runs, write_report
from marlora.rollouts.report.sections import signed_interval
from marlora.trainers.model.local_models import SHORT


def add_report(parser: argparse.ArgumentParser) -> None:
    """Arguments of `marlora report`."""
    parser.add_argument("run", nargs="+", help="run folders")
    parser.add_argument(
        "--output", default="", help="the file; default is report.html in the first run's folder"
    )
    parser.add_argument(
        "--max_episodes",
        type=int,
        default=MAX_EPISODES,
        help="episodes whose whole text the page holds",
    )
    add_model(parser, "where the base's tokenizer lies, to show single tokens")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="serve the page on this machine while the run goes on; Ctrl-C ends",
    )
    parser.add_argument("--port", type=int, default=0, help="of --follow; 0 takes a free one")
    add_json(parser)


def cmd_report(args: argparse.Namespace) -> None:
    """Write one HTML file of a run or several: curves, comparison, adapters, episodes; opens from
    disk."""
    folders = [Path(name) for name in args.run]
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise SettingError(f"{folder}: no config.yaml; expected the folder of a run")
    if args.max_episodes < 1:
        raise SettingError(f"--max_episodes: expected at least 1, got {args.max_episodes}")
    pieces = pieces_of(folders, args.model)
    if args.follow:
        asyncio.run(serve(LiveReport(folders, pieces, args.max_episodes), args.port))
        return
    runs = read_runs(folders)
    page = write_report(
        *folders,
        output=Path(args.output) if args.output else None,
        pieces=pieces,
        max_episodes=args.max_episodes,
        runs=runs,
    )
    numbers = numbers_of(runs)
    for run in runs:
        for part in spent_lines(run.summary):
            show(args.json, part if len(runs) == 1 else f"{run.name}: {part}")
    if numbers["paired"]:
        show(args.json, tests_table(numbers["paired"]))
    show(args.json, str(page))
    write_json(args.json, {"page": str(page), **numbers})


def tests_table(tests: Sequence[Mapping[str, Any]]) -> str:
    """The paired tests of runs against the first one, as a table."""
    columns = ("run", "tasks", "difference", "95 % interval", "gained", "lost", "p")
    rows = [
        (
            test["run"],
            str(test["tasks"]),
            f"{test['difference']:+.3f}",
            signed_interval(test["ci95"]),
            str(test["gained"]),
            str(test["lost"]),
            f"{test['p']:.3g}",
        )
        for test in tests
    ]
    return table(f"against {tests[0]['against']}, on the same tasks", columns, rows)


async def serve(follow: LiveReport, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    print(
        f"{await follow.start(port)}\nthe address is the key: who has it can read the run; Ctrl-C"
        " ends",
        flush=True,
    )
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    with contextlib.suppress(asyncio.CancelledError):
        await ended.wait()
    await follow.close()
    say("stopped")


def pieces_of(folders: Sequence[Path], models: Sequence[str]) -> Pieces | None:
    """The text of each token, by the tokenizers of the runs' bases; None, and a word about it,
    where one is not on this machine; None too where all models were outside ones."""
    import yaml

    bases: dict[str, str] = {}  # policy -> base
    names = set()
    for folder in folders:
        config: dict[str, Any] = (
            yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        )
        names.add(str(config.get("model", "")))
        bases |= {
            name: spec["base"]
            for name, spec in (config.get("policies") or {}).items()
            if (spec or {}).get("base") and not spec.get("url")
        }
    names -= {""}
    if not names and not bases:
        return None
    if len(names) > 1 and not models:
        say(
            "tokens are not shown one by one: the runs have different bases; a report of one run"
            " shows them"
        )
        return None
    where = locate(models)
    tokenizers: dict[str, Any] = {}
    for base in {*names, *bases.values()}:
        if not (
            models or base in SHORT or Path(base).is_dir()
        ):  # a short name lies here once a run has used it
            say(
                f"tokens are not shown one by one: the tokenizer of {base!r} is not here; name its"
                " folder with --model"
            )
            return None
        tokenizers[base] = load_tokenizer(where(base))
    usual = next(iter([*names, *bases.values()]))

    @functools.cache
    def piece(base: str, token: int) -> str:
        return str(
            tokenizers[base].decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    return lambda policy, ids: [piece(bases.get(policy, usual), token) for token in ids]
