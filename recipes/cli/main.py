"""The `marlora` command: look at, talk to, serve and measure trained teams."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from marlora.agents.types import SettingError, Task, nearest, to_json
from marlora.recipes.cli.evaluate import add_eval, cmd_eval
from marlora.recipes.cli.export import add_export, cmd_export
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
from marlora.recipes.launch.tables import table
from marlora.rollouts.checkpoints.team import LoadedTeam
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.episodes.runner import EpisodeRequest, episode_requests
from marlora.rollouts.episodes.store import Store, StoreError
from marlora.rollouts.types import Episode
from marlora.trainers.collection.background import stoppable
from marlora.trainers.errors import RunError


def cmd_collect(args: argparse.Namespace) -> None:
    """Play tasks and append the scored episodes to a store; what it holds already is not played
    again."""

    async def work(team: LoadedTeam) -> None:
        part, parts = shard(args.shard)
        tasks = team.tasks(args.tasks, args.num_tasks, args.split)[part::parts]
        versions = chosen(team, args.adapters)
        # The label says who plays, so that another checkpoint's or choice of adapters' episodes are
        # other ones.
        who = hashlib.sha256(
            "\n".join([str(team.data["step"]), *sorted(versions.values())]).encode()
        ).hexdigest()[:8]
        label = f"collect-{args.split}-{args.seed}-{who}"
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
                team, plan, versions, greedy=False, what="collect", keep=partial(keep, store)
            )
        print(f"{len(plan)} episodes appended to {args.output}")

    asyncio.run(with_team(args, work))


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
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise SettingError(f"{flag} {text!r}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SettingError(f"{flag} {text!r}: expected a JSON object")
    return found


def show_episode(episode: Episode) -> str:
    lines = []
    for turn in episode.turns:
        if turn.taken:
            lines.append(
                f"[{turn.agent}] was told: {turn.messages[-1].content}\n[{turn.agent}] {turn.text}"
            )
    lines.append(f"team: {episode.output if episode.error is None else f'failed: {episode.error}'}")
    return "\n".join(lines)


def cmd_play(args: argparse.Namespace) -> None:
    """Talk to a team; every line you type is a task and each agent's words are shown."""
    meta = json_object("--meta", args.meta)

    async def work(team: LoadedTeam) -> None:
        versions = chosen(team, args.adapters)
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
                episode = await player.play(job, versions)
                print(
                    json.dumps(to_json(episode)) if args.raw else show_episode(episode), flush=True
                )

    asyncio.run(with_team(args, work))


def cmd_serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint's adapters on a vLLM server of ours until Ctrl-C; each adapter is a model
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
        on = chosen(team, args.adapters)
        for engine in team.engines:
            assert isinstance(engine, VLLMEngine)
            for replica in engine.replicas.values():
                assert replica.server is not None
                print(
                    f"url {replica.url}\nkey_file {replica.server.key_file}\nmodel {replica.base}"
                    " (base)"
                )
        for policy, version in on.items():
            print(f"model {version} (policy {policy})")
        print(
            'ask: POST URL/v1/chat/completions or /v1/completions with "Authorization: Bearer $(cat'
            ' KEY_FILE)"; ready, Ctrl-C ends',
            flush=True,
        )
        # Handlers of our own: clusters send SIGTERM, and a served team ends the same way by either
        # signal.
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        await ended.wait()

    with contextlib.suppress(KeyboardInterrupt):  # while it was starting
        asyncio.run(with_team(args, work))
    say("stopped")


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure, interleaved in one run; every ratio stands behind a gate on equal results."""
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
    """What this machine can do for marlora, and what to mend."""
    from marlora.recipes.cli.doctor import examine

    rows, broken = examine(args.model, args.server_urls)
    print(table("marlora doctor", ("part", "found", "what to do"), rows, words=True))
    if broken:
        raise RunError(f"doctor: training cannot work here: {', '.join(broken)}")


class _Parser(argparse.ArgumentParser):
    """Says which flags it does not know, and not what was typed after them: that may be a key."""

    def error(self, message: str) -> NoReturn:
        head, found, rest = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in rest.split() if word.startswith("-")]
        super().error(
            f"{head}{found}{' '.join(flags) or '(not shown: no flag stands before them)'}"
            if found
            else message
        )


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="marlora", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=(run.__doc__ or "").split(";")[0].strip(),
            description=run.__doc__,
            allow_abbrev=False,
        )
        made.set_defaults(run_command=run)
        return made

    add_eval(command("eval", cmd_eval))
    made = command("collect", cmd_collect)
    add_team(made)
    made.add_argument("--output", required=True, help="folder of the store")
    made.add_argument("--tasks", default="", help="another task set")
    made.add_argument("--split", default="train", choices=("train", "eval"))
    made.add_argument("--num_tasks", type=int, default=64)
    made.add_argument("--num_generations", type=int, default=1, help="episodes per task")
    made.add_argument(
        "--shard",
        default="",
        help="I/N: every N-th task from the I-th on; N such processes fill one store together",
    )
    made = command("play", cmd_play)
    add_team(made)
    made.add_argument(
        "--meta",
        default="",
        help="public meta of every task, as JSON (systems that show parts of a task need it)",
    )
    made.add_argument(
        "--sampled", action="store_true", help="at the run's temperature instead of 0"
    )
    made.add_argument("--raw", action="store_true", help="print each episode as one line of JSON")
    add_team(command("serve", cmd_serve))
    add_report(command("report", cmd_report))
    add_export(command("export", cmd_export))
    made = command("bench", cmd_bench)
    made.add_argument(
        "suite", help="update, agents, serve, publish, loop, rollout, sandbox or proxy"
    )
    made.add_argument("--json", default="", help="write the numbers here")
    made.add_argument("--repeats", type=int, default=3, help="interleaved repeats")
    made.add_argument(
        "--size",
        default="135m",
        help="geometry of the model: tiny, 135m, or on a GPU qwen3-0.6b, qwen3-4b, qwen3-8b",
    )
    made.add_argument(
        "--engine",
        default="",
        choices=("", "transformers", "vllm"),
        help="of publish and loop; all that are here if not given",
    )
    made.add_argument(
        "--device", default="", help="of update and agents: cpu or cuda; the GPU if there is one"
    )
    made.add_argument(
        "--rho",
        nargs="*",
        type=float,
        default=[],
        help="of update: only these shares of raw over unique tokens",
    )
    made.add_argument(
        "--opponents",
        nargs="*",
        default=[],
        choices=("padded", "per_turn", "trl", "trl_compact_head", "comlrl"),
        help="of update: only these; of loop: comlrl, installed in an environment of its own first",
    )
    made = command("doctor", cmd_doctor)
    add_model(made, "a model whose chat template is to be tried, besides those in the cache")
    made.add_argument(
        "--server_urls",
        nargs="+",
        default=[],
        help="servers that others run: tries what they answer without a key",
    )
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        if getattr(args, "json", "") and not Path(args.json).absolute().parent.is_dir():
            raise SettingError(f"--json {args.json}: no such folder")
        with stoppable():
            args.run_command(args)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (RunError, EngineError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
