"""The `marlora` command: look at, talk to, serve and measure trained teams."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from marlora.agents.concurrency import run_steadily
from marlora.agents.types import SettingError, Task, nearest, to_json
from marlora.recipes.cli.cache import add_cache, cmd_cache
from marlora.recipes.cli.compare import add_compare, cmd_compare
from marlora.recipes.cli.evaluate import add_eval, cmd_eval
from marlora.recipes.cli.export import add_export, cmd_export
from marlora.recipes.cli.init import add_init, cmd_init
from marlora.recipes.cli.report import add_report, cmd_report
from marlora.recipes.cli.team import (
    add_model,
    add_team,
    chosen,
    engine_config,
    play_all,
    say,
    with_team,
    write_json,
)
from marlora.recipes.cli.train import add_recipes, add_train, cmd_recipes, cmd_train
from marlora.recipes.launch.settings import exit_with_code, import_from_here, run
from marlora.recipes.launch.tables import table
from marlora.rollouts.checkpoints.team import LoadedTeam
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.episodes.runner import EpisodeRequest, episode_requests
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.errors import RunError


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


def cmd_serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint's adapters on a guarded vLLM server until Ctrl-C; each adapter is a model
    by name."""
    if choose_engine(engine_config(args))[0] != "vllm":
        raise SettingError(
            "serve: needs vLLM, the transformers engine has no address; install the extra (make"
            " setup) and give --engine vllm"
        )
    if args.server_urls or args.endpoints:
        raise SettingError(
            "serve: starts a server of its own; leave --server_urls and --endpoints out"
        )

    async def work(team: LoadedTeam) -> None:
        if not team.engines:
            raise SettingError(
                f"{args.checkpoint}: every agent is a model asked over the network, so there is"
                " nothing to serve here"
            )
        on = chosen(team, args.adapters)
        for engine in team.engines:
            assert isinstance(engine, VLLMEngine)
            for replica in engine.replicas.values():
                assert replica.server is not None
                print(
                    f"url {replica.url}\nkey_file {replica.server.key_file}\nmodel {replica.base}"
                    " (base)"
                )
        for policy, version in on.versions.items():
            print(f"model {version} (policy {policy})")
        print(
            'ask: POST URL/v1/chat/completions or /v1/completions with "Authorization: Bearer $(cat'
            ' KEY_FILE)"; ready, Ctrl-C ends',
            flush=True,
        )
        # clusters send SIGTERM; a served team ends the same way by either signal
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        await ended.wait()

    with contextlib.suppress(KeyboardInterrupt):  # while it was starting
        run_steadily(with_team(args, work))
    say("stopped")


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure speed and memory, interleaved in one run; every ratio requires equal results."""
    from marlora.trainers.bench.geometry import check_size
    from marlora.trainers.bench.measure import Options
    from marlora.trainers.bench.suites import SUITES

    if args.suite not in SUITES:
        raise SettingError(f"bench {args.suite!r}: no such suite; {nearest(args.suite, SUITES)}")
    if args.repeats < 1:
        raise SettingError(f"--repeats: expected at least 1, got {args.repeats}")
    options = Options(
        args.repeats,
        args.size,
        args.engine,
        tuple(args.opponents),
        tuple(args.rho),
        *([args.device] if args.device else []),
    )
    check_size(args.size)
    result = SUITES[args.suite](options)
    print(table(result.pop("title"), result.pop("columns"), result.pop("rows")))
    given = [
        f"--{name} {value}"
        for name in ("size", "repeats", "engine", "device")
        if (value := getattr(args, name))
    ]
    given += [f"--rho {' '.join(f'{rho:g}' for rho in args.rho)}"] if args.rho else []
    given += [f"--opponents {' '.join(args.opponents)}"] if args.opponents else []
    write_json(
        args.json,
        {
            "command": " ".join(["marlora bench", args.suite, *given]),
            "repeats": args.repeats,
            **result,
        },
    )


def cmd_doctor(args: argparse.Namespace) -> None:
    """What this machine can do for marlora, and how to fix what is missing."""
    from marlora.recipes.cli.doctor import examine

    rows, broken = examine(args.model, args.server_urls)
    print(table("marlora doctor", ("part", "found", "what to do"), rows, words=True))
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


def add_bench(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora bench`."""
    command.add_argument(
        "suite", help="update, agents, serve, publish, loop, rollout, sandbox, proxy or ahead"
    )
    command.add_argument("--json", default="", help="write the numbers here")
    command.add_argument("--repeats", type=int, default=3, help="interleaved repeats")
    command.add_argument(
        "--size",
        default="135m",
        help="geometry of the model: tiny, 135m, or on a GPU qwen3-0.6b, qwen3-4b, qwen3-8b",
    )
    command.add_argument(
        "--engine",
        default="",
        choices=("", "transformers", "vllm"),
        help="of publish and loop; all that are here if not given",
    )
    command.add_argument(
        "--device", default="", help="of update and agents: cpu or cuda; the GPU if there is one"
    )
    command.add_argument(
        "--rho",
        nargs="*",
        type=float,
        default=[],
        help="of update: only these shares of raw over unique tokens",
    )
    command.add_argument(
        "--opponents",
        nargs="*",
        default=[],
        choices=("padded", "per_turn", "trl", "trl_compact_head", "comlrl"),
        help=(
            "of update: only these; of loop: comlrl, which a checkout's script first installs into"
            " a temporary folder"
        ),
    )


def add_doctor(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora doctor`."""
    add_model(command, "a model whose chat template is to be tried, besides those in the cache")
    command.add_argument(
        "--server_urls",
        nargs="+",
        default=[],
        help="servers that others run: tries what they answer without a key",
    )


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
        "cache": (cmd_cache, add_cache),
        "doctor": (cmd_doctor, add_doctor),
    }


def _names_code(args: argparse.Namespace) -> bool:
    """Whether the user consents to code outside marlora. Without that the current folder, which may
    be a stranger's checkpoint, is not put on the import path."""
    tasks = getattr(args, "tasks", "")
    names = [tasks] if isinstance(tasks, str) else tasks
    given = getattr(args, "system", "") or getattr(args, "trust_checkpoint", False)
    return bool(given) or any(":" in name for name in names)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `marlora`."""
    args = parser().parse_args(argv)

    if args.command == "train":  # signals, processes and exit codes as of a recipe
        run(partial(args.run_command, args))
        return

    def work() -> None:
        if getattr(args, "json", "") and not Path(args.json).absolute().parent.is_dir():
            raise SettingError(f"--json {args.json}: no such folder")
        if _names_code(args):
            import_from_here()
        args.run_command(args)

    exit_with_code(work, interrupted="stopped")


if __name__ == "__main__":
    main()
