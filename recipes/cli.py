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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from marlora.agents.types import SettingError, Task, nearest, to_json
from marlora.recipes.tables import eval_rows, table
from marlora.rollouts.engines.engine import EngineError
from marlora.rollouts.engines.start import EngineConfig, choose_engine
from marlora.rollouts.engines.vllm import VLLMEngine
from marlora.rollouts.evaluate import Evaluation, evaluation, paired
from marlora.rollouts.play import Job, jobs
from marlora.rollouts.saved import read_checkpoint
from marlora.rollouts.served import ServedTeam
from marlora.rollouts.store import Store, StoreError
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunError
from marlora.trainers.models import local_model
from marlora.trainers.progress import Progress


def add_team(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that puts a checkpoint to work."""
    parser.add_argument("checkpoint", help="a checkpoint folder: RUN/checkpoints/step-NNNNNN")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="where the base model lies now, if it moved; by NAME if the team has several",
    )
    parser.add_argument("--system", default="", help="module:Class, if the system is not one of marlora.agents")
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="import rewards, tools and task sets it names outside marlora, and ask models it names by URL",
    )
    parser.add_argument(
        "--adapters", default="all", help="all, none, or names of policies separated by commas; the others speak as the bare base"
    )
    parser.add_argument("--seed", type=int, default=0, help="everything sampled follows from it")
    engine = parser.add_argument_group("engine")
    for f in fields(EngineConfig):
        value = getattr(EngineConfig(), f.name)
        kind: dict[str, Any] = {"type": type(value), "default": value}
        if isinstance(value, bool):
            kind = {"action": "store_true"}
        elif isinstance(value, list):
            kind = {"nargs": "+", "default": value}
        elif isinstance(value, dict):
            kind = {"type": json.loads, "default": value, "metavar": "JSON"}
        engine.add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%"), **kind)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})


def locate(given: Sequence[str]) -> Callable[[str], str]:
    """From a base's name to where it lies: as `--model` says, else as the run named it."""
    named = dict(entry.split("=", 1) for entry in given if "=" in entry)
    plain = [entry for entry in given if "=" not in entry]
    if len(plain) > 1:
        raise SettingError(f"--model: given {len(plain)} times without a name; expected NAME=FOLDER for each")
    return lambda name: named.get(name) or (plain[0] if plain else local_model(name))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def asked_for(adapters: str, trained: Sequence[str]) -> list[str]:
    """The policies that `--adapters` names."""
    names = {"all": list(trained), "none": []}.get(adapters, adapters.split(","))
    for name in names:
        if name not in trained:
            raise SettingError(
                f"--adapters {name}: the checkpoint has no trained adapter of that name; it has {', '.join(trained) or 'none'}"
            )
    return names


def chosen(team: ServedTeam, adapters: str) -> dict[str, str]:
    """The team version that `--adapters` asks for."""
    return {name: team.versions[name] for name in asked_for(adapters, list(team.versions))}


async def with_team(args: argparse.Namespace, work: Callable[[ServedTeam], Any]) -> Any:
    """Open the checkpoint's team, work with it, close it."""
    adapters = read_checkpoint(Path(args.checkpoint))["adapters"]
    asked_for(args.adapters, [name for name, entry in adapters.items() if entry.get("trained")])  # before a server starts
    with tempfile.TemporaryDirectory(prefix="marlora-") as scratch:
        team = await ServedTeam.open(
            args.checkpoint,
            engine_config(args),
            locate=locate(args.model),
            system=args.system,
            trust=args.trust_checkpoint,
            scratch=Path(scratch),
            seed=args.seed,
            say=say,
        )
        try:
            return await work(team)
        finally:
            await team.close()


async def play_all(
    team: ServedTeam,
    plan: Sequence[Job],
    versions: Mapping[str, str],
    *,
    greedy: bool,
    what: str,
    keep: Callable[[Episode], Any] | None = None,
) -> list[Episode]:
    """Play with a bar; `keep` gets each episode as it ends."""
    progress, found = Progress(), []
    player = team.rollouts.greedy() if greedy else team.rollouts
    try:
        progress.start(0, 0)
        with progress.episodes(what, len(plan), 0, team.metric) as tick:
            async for episode in player.collect(plan, versions):
                found.append(episode)
                if keep is not None:
                    keep(episode)
                tick(episode)
    finally:
        progress.close()
    return found


async def measure(team: ServedTeam, tasks: Sequence[Task], versions: Mapping[str, str], what: str, greedy: bool) -> Evaluation:
    return evaluation(tasks, await play_all(team, jobs(tasks, label="eval"), versions, greedy=greedy, what=what), team.metric)


def cmd_eval(args: argparse.Namespace) -> None:
    """Held-out accuracy of a checkpoint's team, paired against the same team with its adapters off."""

    async def work(team: ServedTeam) -> dict[str, Any]:
        tasks, versions, greedy = team.tasks(args.tasks, args.num_tasks), chosen(team, args.adapters), not args.sampled
        before = await measure(team, tasks, {}, "base team", greedy)
        alone: dict[str, Evaluation] = {}
        for name, version in versions.items() if args.ablate and len(versions) > 1 else ():
            alone[name] = await measure(team, tasks, {name: version}, f"only {name}", greedy)
        after = await measure(team, tasks, versions, "trained team", greedy) if versions else before
        return {
            "checkpoint": str(args.checkpoint),
            "metric": team.metric,
            "tasks": args.tasks or team.data["tasks"]["name"],
            "seed": args.seed,
            "sampled": args.sampled,
            "engine": team.engines[0].info().kind if team.engines else "none",
            "adapters_on": list(versions),
            "eval": {"before": before.summary(), "after": after.summary(), "paired": paired(before, after)},
            "adapters": {name: {**found.summary(), "paired": paired(before, found)} for name, found in alone.items()},
        }

    result = asyncio.run(with_team(args, work))
    if not result["adapters_on"]:
        say("no adapter is on: the team as asked for is the base team")
    columns = (result["metric"], "mean", "95 % interval", "tasks", "against base", "95 % interval (paired)")
    asked = "trained team" if args.adapters == "all" else f"adapters: {', '.join(result['adapters_on']) or 'none'}"
    print(table(f"{args.checkpoint} on {result['tasks']}", columns, eval_rows(result, asked)))
    write_json(args.json, result)


def cmd_collect(args: argparse.Namespace) -> None:
    """Play tasks and append the scored episodes to a store; what it holds already is not played again."""

    async def work(team: ServedTeam) -> None:
        tasks = team.tasks(args.tasks, args.num_tasks, args.split)
        versions = chosen(team, args.adapters)
        # The label says who plays, so that another checkpoint's or choice of adapters' episodes are other ones.
        who = hashlib.sha256("\n".join([str(team.data["step"]), *sorted(versions.values())]).encode()).hexdigest()[:8]
        label = f"collect-{args.split}-{args.seed}-{who}"
        with Store(Path(args.output)) as store:
            known = store.ids()
            plan = [job for job in jobs(tasks, label=label, num_generations=args.num_generations) if job.id not in known]
            say(f"{len(plan)} episodes to play; {args.output} holds {len(known)}")
            await play_all(team, plan, versions, greedy=False, what="collect", keep=store.append)
        print(f"{len(plan)} episodes appended to {args.output}")

    asyncio.run(with_team(args, work))


def write_json(path: str, value: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(value, indent=2) + "\n")


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
            lines.append(f"[{turn.agent}] was told: {turn.messages[-1].content}\n[{turn.agent}] {turn.text}")
    lines.append(f"team: {episode.output if episode.error is None else f'failed: {episode.error}'}")
    return "\n".join(lines)


def cmd_play(args: argparse.Namespace) -> None:
    """Talk to a team; every line you type is a task and each agent's words are shown."""
    meta = json_object("--meta", args.meta)

    async def work(team: ServedTeam) -> None:
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
                job = Job(Task(f"typed-{number}", line.strip(), meta=meta), f"play-{args.seed}", number)
                episode = await player.play(job, versions)
                print(json.dumps(to_json(episode)) if args.raw else show_episode(episode), flush=True)

    asyncio.run(with_team(args, work))


def cmd_serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint's adapters on a vLLM server of ours until Ctrl-C; each adapter is a model by name."""
    if choose_engine(args.engine, args.server_urls)[0] != "vllm":
        raise SettingError(
            "serve: needs vLLM, the transformers engine has no address; install the extra (make setup) and give --engine vllm"
        )
    if args.server_urls:
        raise SettingError("serve: starts a server of its own; leave --server_urls out")

    async def work(team: ServedTeam) -> None:
        on = chosen(team, args.adapters)
        for engine in team.engines:
            assert isinstance(engine, VLLMEngine)
            for replica in engine.replicas.values():
                assert replica.server is not None
                print(f"url {replica.url}\nkey_file {replica.server.key_file}\nmodel {replica.base} (base)")
        for policy, version in on.items():
            print(f"model {version} (policy {policy})")
        print('ask: POST URL/v1/completions with "Authorization: Bearer $(cat KEY_FILE)"; ready, Ctrl-C ends', flush=True)
        # Handlers of our own: a job started in the background of a script ignores Ctrl-C, and clusters send SIGTERM.
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        await ended.wait()

    with contextlib.suppress(KeyboardInterrupt):  # while it was starting
        asyncio.run(with_team(args, work))
    say("stopped")


def cmd_report(args: argparse.Namespace) -> None:
    """Write report.html of a run: one file, opens from disk."""
    from marlora.rollouts.report import write_report

    for run in args.run:
        print(write_report(Path(run)))


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure, interleaved in one run; every ratio stands behind a gate on equal results."""
    from marlora.trainers.bench import SUITES

    if args.suite not in SUITES:
        raise SettingError(f"bench {args.suite!r}: no such suite; {nearest(args.suite, SUITES)}")
    if args.repeats < 1:
        raise SettingError(f"--repeats: expected at least 1, got {args.repeats}")
    result = SUITES[args.suite](args.repeats)
    print(table(result.pop("title"), result.pop("columns"), result.pop("rows")))
    write_json(args.json, {"command": f"marlora bench {args.suite} --repeats {args.repeats}", **result})


def cmd_doctor(args: argparse.Namespace) -> None:
    """What this machine can do for marlora, and what to mend."""
    from marlora.recipes.doctor import examine

    rows, broken = examine()
    print(table("marlora doctor", ("part", "found", "what to do"), rows, words=True))
    if broken:
        raise RunError(f"doctor: training cannot work here: {', '.join(broken)}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="marlora", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=(run.__doc__ or "").split(";")[0].strip(), description=run.__doc__, allow_abbrev=False
        )
        made.set_defaults(run_command=run)
        return made

    made = command("eval", cmd_eval)
    add_team(made)
    made.add_argument("--tasks", default="", help="another task set; default is the checkpoint's own held-out tasks")
    made.add_argument("--num_tasks", type=int, default=None, help="at most so many")
    made.add_argument("--ablate", action="store_true", help="also each adapter alone")
    made.add_argument("--sampled", action="store_true", help="at the run's temperature instead of 0")
    made.add_argument("--json", default="", help="write the numbers here")
    made = command("collect", cmd_collect)
    add_team(made)
    made.add_argument("--output", required=True, help="folder of the store")
    made.add_argument("--tasks", default="", help="another task set")
    made.add_argument("--split", default="train", choices=("train", "eval"))
    made.add_argument("--num_tasks", type=int, default=64)
    made.add_argument("--num_generations", type=int, default=1, help="episodes per task")
    made = command("play", cmd_play)
    add_team(made)
    made.add_argument("--meta", default="", help="public meta of every task, as JSON (systems that show parts of a task need it)")
    made.add_argument("--sampled", action="store_true", help="at the run's temperature instead of 0")
    made.add_argument("--raw", action="store_true", help="print each episode as one line of JSON")
    add_team(command("serve", cmd_serve))
    command("report", cmd_report).add_argument("run", nargs="+", help="run folders")
    made = command("bench", cmd_bench)
    made.add_argument("suite", help="what to measure")
    made.add_argument("--json", default="", help="write the numbers here")
    made.add_argument("--repeats", type=int, default=5, help="interleaved repeats")
    command("doctor", cmd_doctor)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        if getattr(args, "json", "") and not Path(args.json).absolute().parent.is_dir():
            raise SettingError(f"--json {args.json}: no such folder")
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
