"""`marlora play`: talk to the team of a checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from dataclasses import replace
from typing import Any

from marlora.agents.concurrency import run_steadily
from marlora.agents.types import SettingError, Task, to_json
from marlora.recipes.cli.checkpoint.team import add_team, chosen, say, with_team
from marlora.rollouts.checkpoints.team import LoadedTeam
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.types import Episode


def add_play(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora play`."""
    add_team(command)
    command.add_argument(
        "--meta",
        default="",
        help="public meta of every task, as JSON (systems that show parts of a task need it)",
    )
    command.add_argument(
        "--sampled", action="store_true", help="at the run's temperature instead of 0"
    )
    command.add_argument(
        "--raw", action="store_true", help="print each episode as one line of JSON"
    )


def cmd_play(args: argparse.Namespace) -> None:
    """Talk to a team; every line you type is a task and each agent's replies are shown."""
    meta = json_object("--meta", args.meta)

    async def work(team: LoadedTeam) -> None:
        state = chosen(team, args.adapters)
        # Typed tasks have no answer, so nothing is scored.
        player = replace(team.rollouts if args.sampled else team.rollouts.greedy(), rewards=())
        if sys.stdin.isatty():
            say("type a task and press Enter; Ctrl-D ends")
        for number in itertools.count():
            line = await asyncio.to_thread(sys.stdin.readline)
            if not line:
                break
            if line.strip():
                job = EpisodeRequest(
                    Task(f"typed-{number}", line.strip(), meta=meta), f"play-{args.seed}", number
                )
                episode = await player.play(job, state)
                print(
                    json.dumps(to_json(episode)) if args.raw else show_episode(episode), flush=True
                )

    run_steadily(with_team(args, work))


def json_object(flag: str, text: str) -> dict[str, Any]:
    """A flag's value as a JSON object."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise SettingError(f"{flag} {text!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SettingError(f"{flag} {text!r}: expected a JSON object")
    return value


def show_episode(episode: Episode) -> str:
    """The turns of an episode as lines of text, and the team's output."""
    lines = []
    for turn in episode.turns:
        if turn.taken:
            lines.append(
                f"[{turn.agent}] was told: {turn.messages[-1].content}\n[{turn.agent}] {turn.text}"
            )
    lines.append(f"team: {episode.output if episode.error is None else f'failed: {episode.error}'}")
    return "\n".join(lines)
