"""`marlora collect`: plays tasks with the team of a checkpoint and stores the episodes."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from marlora.agents.concurrency import run_steadily
from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint.team import add_team, chosen, play_all, say, with_team
from marlora.rollouts.checkpoints.team import LoadedTeam
from marlora.rollouts.episodes.runner import episode_requests
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.errors import RunError


def add_collect(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora collect`."""
    add_team(command)
    command.add_argument("--output", required=True, help="folder of the store")
    command.add_argument("--tasks", default="", help="another task set")
    command.add_argument("--split", default="train", choices=("train", "eval"))
    command.add_argument("--num_tasks", type=int, default=64)
    command.add_argument("--num_generations", type=int, default=1, help="episodes per task")
    command.add_argument(
        "--shard",
        default="",
        help="I/N: every N-th task from the I-th on; N such processes fill one store together",
    )


def cmd_collect(args: argparse.Namespace) -> None:
    """Play tasks and append the scored episodes to a store; what it holds already is not played
    again."""

    async def work(team: LoadedTeam) -> None:
        part, parts = shard(args.shard)
        tasks = team.tasks(args.tasks, args.num_tasks, args.split)[part::parts]
        state = chosen(team, args.adapters)
        # named by the state: episodes of another checkpoint or choice of adapters are other ones
        label = f"collect-{args.split}-{args.seed}-{state.key[:8]}"
        with Store(Path(args.output), writer=str(part) if args.shard else "") as store:
            known = store.ids()
            plan = [
                job
                for job in episode_requests(
                    tasks, label=label, num_generations=args.num_generations
                )
                if job.id not in known
            ]
            say(f"{len(plan)} episodes to play; {args.output} holds {len(known)}")
            await play_all(
                team, plan, state, greedy=False, what="collect", keep=partial(keep, store)
            )
        print(f"{len(plan)} episodes appended to {args.output}")

    run_steadily(with_team(args, work))


def keep(store: Store, episode: Episode) -> None:
    """Store an episode. Raises `RunError` where that fails; what was stored before is whole."""
    try:
        store.append(episode)
    except OSError as error:
        raise RunError(
            f"episode {episode.id} could not be stored in {store.folder}: {error}; earlier ones are"
            " whole"
        ) from error


def shard(text: str) -> tuple[int, int]:
    """`I/N` as two numbers; "" is all of it."""
    part, _, parts = (text or "0/1").partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise SettingError(f"--shard {text!r}: expected I/N with I from 0 to N - 1, such as 0/8")
    return int(part), int(parts)
