"""Shared parts of the commands that load a checkpoint: arguments, opening its team, playing with a
progress bar."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from marlora.agents.state import TeamState
from marlora.agents.text.secrecy import not_shown
from marlora.agents.types import PolicySpec, SettingError
from marlora.recipes.launch.settings import noted_imports, read_yaml
from marlora.rollouts.checkpoints.reader import read_checkpoint
from marlora.rollouts.checkpoints.team import LoadedTeam, LoadOptions, load_team
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.types import Episode
from marlora.trainers.model.local_models import local_model
from marlora.trainers.monitoring.progress import Progress


def add_model(parser: argparse.ArgumentParser, why: str) -> None:
    """The flag `--model [NAME=]FOLDER`, given once per base."""
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]FOLDER", help=why)


def add_team(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Arguments of every command that puts a checkpoint, or several, to work."""
    what = "checkpoint folders" if several else "a checkpoint folder"
    parser.add_argument(
        "checkpoint", nargs="+" if several else None, help=f"{what}: RUN/checkpoints/step-NNNNNN"
    )
    add_model(parser, "where the base model lies now, if it moved; by NAME if the team has several")
    parser.add_argument(
        "--system", default="", help="module:Class, if the system is not one of marlora.agents"
    )
    parser.add_argument(
        "--rewards",
        nargs="+",
        default=None,
        help="score by these instead of the checkpoint's own, such as correct or module:function",
    )
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help=(
            "import rewards, tools and task sets it names outside marlora, and ask models it names"
            " by URL"
        ),
    )
    parser.add_argument(
        "--adapters",
        default="all",
        help=(
            "all, none, or names of policies separated by commas; the others speak as the bare base"
        ),
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="everything sampled follows from it (default: that of the checkpoint's run)",
    )
    engine = parser.add_argument_group("engine")
    for f in fields(EngineConfig):
        value = getattr(EngineConfig(), f.name)
        kind: dict[str, Any] = {"type": type(value), "default": value}
        if isinstance(value, bool):
            kind = {"action": "store_true"}
        elif isinstance(value, list):
            kind = {"nargs": "+", "default": value}
        elif isinstance(value, dict):
            kind = {"type": _json, "default": value, "metavar": "JSON"}
        engine.add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%"), **kind)


def _json(text: str) -> Any:
    """JSON on the command line. What is none is not repeated in the error: it may hold a key."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, {not_shown(text)}") from error


def import_folders(checkpoints: Sequence[str]) -> list[Path]:
    """The folders of the user's own code that the runs of these checkpoints have noted
    (`config.yaml`, `imports`), as far as they are there. For a reader who trusts them."""
    configs = [Path(each).resolve().parent.parent / "config.yaml" for each in checkpoints]
    return [each for path in configs if path.is_file() for each in noted_imports(read_yaml(path))]


def engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})


def locate(given: Sequence[str]) -> Callable[[str], str]:
    """From a base's name to where it lies: as `--model` says, else as the run named it."""
    named = dict(entry.split("=", 1) for entry in given if "=" in entry)
    plain = [entry for entry in given if "=" not in entry]
    if len(plain) > 1:
        raise SettingError(
            f"--model: given {len(plain)} times without a name; expected NAME=FOLDER for each"
        )
    return lambda name: named.get(name) or (plain[0] if plain else local_model(name))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def asked_for(adapters: str, trained: Sequence[str]) -> list[str]:
    """The policies that `--adapters` names."""
    names = {"all": list(trained), "none": []}.get(adapters, adapters.split(","))
    for name in names:
        if name not in trained:
            raise SettingError(
                f"--adapters {name}: the checkpoint has no trained adapter of that name; it has"
                f" {', '.join(trained) or 'none'}"
            )
    return names


def chosen(team: LoadedTeam, adapters: str) -> TeamState:
    """The team's state with the adapters that `--adapters` asks for."""
    names = asked_for(adapters, list(team.versions))
    return team.state.with_versions({name: team.versions[name] for name in names})


def run_seed(asked: int | None, data: Mapping[str, Any]) -> int:
    """The seed that `--seed` asks for, else the one of a checkpoint's run: what a system draws then
    is what it drew there."""
    return int(data["tasks"]["seed"]) if asked is None else asked


def load_options(
    args: argparse.Namespace, scratch: str, guests: Sequence[PolicySpec] = ()
) -> LoadOptions:
    """How a command's flags load a checkpoint. `guests`: policies of other teams that
    will be loaded beside it."""
    return LoadOptions(
        scratch=Path(scratch),
        locate=locate(args.model),
        system=args.system,
        rewards=args.rewards,
        trust=args.trust_checkpoint,
        seed=args.seed,
        say=say,
        guests=guests,
    )


async def with_team(args: argparse.Namespace, work: Callable[[LoadedTeam], Any]) -> Any:
    """Open the checkpoint's team, work with it, close it."""
    data = read_checkpoint(Path(args.checkpoint))
    adapters, args.seed = data["adapters"], run_seed(args.seed, data)
    asked_for(
        args.adapters, [name for name, entry in adapters.items() if entry.get("trained")]
    )  # before a server starts
    with tempfile.TemporaryDirectory(prefix="marlora-") as scratch:
        options = load_options(args, scratch)
        team = await load_team(args.checkpoint, engine_config(args), options)
        try:
            return await work(team)
        finally:
            await team.close()


async def play_all(
    team: LoadedTeam,
    plan: Sequence[EpisodeRequest],
    state: TeamState,
    *,
    greedy: bool,
    what: str,
    keep: Callable[[Episode], Any] | None = None,
) -> list[Episode]:
    """Play with a bar; `keep` gets each episode as it ends."""
    progress, episodes = Progress(), list[Episode]()
    player = team.rollouts.greedy() if greedy else team.rollouts
    try:
        progress.start(0, 0)
        with progress.episodes(what, len(plan), 0, team.metric) as tick:
            async for episode in player.collect(plan, state):
                episodes.append(episode)
                if keep is not None:
                    keep(episode)
                tick(episode)
    finally:
        progress.close()
    return episodes


def add_json(parser: argparse._ActionsContainer) -> None:
    """The flag `--json FILE`."""
    parser.add_argument(
        "--json", default="", help="write the numbers here too; - prints them instead of tables"
    )


def show(json_path: str, text: str) -> None:
    """Print a table; to stderr where stdout is for the numbers (`--json -`)."""
    print(text, file=sys.stderr if json_path == "-" else sys.stdout)


def write_json(path: str, value: Any) -> None:
    """Write numbers to a file; "-" is stdout, "" nowhere."""
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    elif path:
        Path(path).write_text(text, encoding="utf-8")
