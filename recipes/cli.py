"""The `marlora` command: look at, talk to, serve and measure trained teams."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from marlora.agents.types import SettingError, Task, to_json
from marlora.recipes.tables import accuracy_rows, table
from marlora.rollouts.engines.engine import EngineError
from marlora.rollouts.engines.start import EngineConfig
from marlora.rollouts.evaluate import Evaluation, evaluation, paired
from marlora.rollouts.play import Job, jobs
from marlora.rollouts.served import ServedTeam
from marlora.rollouts.store import Store, StoreError
from marlora.rollouts.types import Episode


def add_team(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that puts a checkpoint to work."""
    parser.add_argument("checkpoint", help="a checkpoint folder: RUN/checkpoints/step-NNNNNN")
    parser.add_argument("--model", default="", help="where the base model lies now, if it moved")
    parser.add_argument("--system", default="", help="module:Class, if the system is not one of marlora.agents")
    parser.add_argument(
        "--adapters", default="all", help="all, none, or names of policies separated by commas; the others speak as the bare base"
    )
    parser.add_argument("--engine", default="auto", help="auto, vllm or transformers")
    parser.add_argument("--server_urls", nargs="*", default=[], help="vLLM servers already running (.../v1)")
    parser.add_argument("--allow_open_server", action="store_true", help="accept such servers though they answer without a key")
    parser.add_argument("--seed", type=int, default=0, help="everything sampled follows from it")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    known = {f.name for f in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in vars(args).items() if name in known})


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(team: ServedTeam, adapters: str) -> dict[str, str]:
    """The team version that `--adapters` asks for."""
    if adapters == "all":
        return dict(team.versions)
    if adapters == "none":
        return {}
    names = adapters.split(",")
    for name in names:
        if name not in team.versions:
            raise SettingError(
                f"--adapters {name}: the checkpoint has no trained adapter of that name; it has {', '.join(team.versions) or 'none'}"
            )
    return {name: team.versions[name] for name in names}


async def with_team(args: argparse.Namespace, work: Callable[[ServedTeam], Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="marlora-") as scratch:
        team = await ServedTeam.open(
            args.checkpoint,
            engine_config(args),
            locate=lambda name: args.model or local_model(name),
            system=args.system,
            scratch=Path(scratch),
            seed=args.seed,
            say=say,
        )
        try:
            return await work(team)
        finally:
            await team.close()


async def play_all(team: ServedTeam, plan: Sequence[Job], versions: Mapping[str, str], *, greedy: bool, what: str) -> list[Episode]:
    from marlora.trainers.progress import Progress

    progress, found = Progress(), []
    player = team.rollouts.greedy() if greedy else team.rollouts
    with progress.episodes(what, len(plan), 0, team.metric) as tick:
        async for episode in player.collect(plan, versions):
            found.append(episode)
            tick(episode)
    progress.close()
    return found


async def measure(team: ServedTeam, tasks: Sequence[Task], versions: Mapping[str, str], what: str, greedy: bool) -> Evaluation:
    return evaluation(tasks, await play_all(team, jobs(tasks, label="eval"), versions, greedy=greedy, what=what), team.metric)


def cmd_eval(args: argparse.Namespace) -> None:
    """Held-out accuracy of a checkpoint's team, paired against the same team with its adapters off."""

    async def work(team: ServedTeam) -> dict[str, Any]:
        tasks = team.tasks(args.tasks, args.num_tasks)
        versions = chosen(team, args.adapters)
        base = await measure(team, tasks, {}, "base team", not args.sampled)
        found = {"base team": base.summary()}
        variants = (
            {f"only {name}": {name: version} for name, version in versions.items()} if args.ablate and len(versions) > 1 else {}
        )
        for name, variant in {**variants, "trained team": versions}.items():
            result = await measure(team, tasks, variant, name, not args.sampled)
            found[name] = {**result.summary(), "paired": paired(base, result)}
        return {
            "checkpoint": str(args.checkpoint),
            "metric": team.metric,
            "tasks": args.tasks or team.data["tasks"]["name"],
            "eval": found,
        }

    result = asyncio.run(with_team(args, work))
    columns = (result["metric"], "mean", "95 % interval", "tasks", "against base", "95 % interval (paired)")
    print(table(f"{args.checkpoint} on {result['tasks']}", columns, accuracy_rows(result["eval"])))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def cmd_collect(args: argparse.Namespace) -> None:
    """Play tasks and append the scored episodes to a store; what it holds already is not played again."""

    async def work(team: ServedTeam) -> None:
        tasks = team.tasks(args.tasks, args.num_tasks, args.split)
        versions = chosen(team, args.adapters)
        with Store(Path(args.output)) as store:
            known = store.ids()
            label = f"collect-{args.split}-{args.seed}"
            plan = [job for job in jobs(tasks, label=label, num_generations=args.num_generations) if job.id not in known]
            say(f"{len(plan)} episodes to play; {args.output} holds {len(known)}")
            async for episode in team.rollouts.collect(plan, versions):
                store.append(episode)
        print(f"{len(plan)} episodes appended to {args.output}")

    asyncio.run(with_team(args, work))


def show_episode(episode: Episode) -> str:
    lines = []
    for turn in episode.turns:
        if turn.taken:
            lines.append(f"[{turn.agent}] was told: {turn.messages[-1].content}\n[{turn.agent}] {turn.text}")
    lines.append(f"team: {episode.output if episode.error is None else f'failed: {episode.error}'}")
    return "\n".join(lines)


def cmd_play(args: argparse.Namespace) -> None:
    """Talk to a team: every line you type is a task; each agent's words are shown."""

    async def work(team: ServedTeam) -> None:
        versions, player = chosen(team, args.adapters), team.rollouts if args.sampled else team.rollouts.greedy()
        examples = team.tasks(limit=1)
        number = 0
        if sys.stdin.isatty():
            say(f"type a task and press Enter (such as: {examples[0].prompt!r}); Ctrl-D ends")
        while line := await asyncio.to_thread(sys.stdin.readline):
            if not line.strip():
                continue
            meta = json.loads(args.meta) if args.meta else {}
            task = Task(f"typed-{number}", line.strip(), meta=meta)
            # Typed tasks have no answer, so nothing is scored.
            from dataclasses import replace

            episode = await replace(player, rewards=()).play(Job(task, f"play-{args.seed}", number), versions)
            print(json.dumps(to_json(episode)) if args.raw else show_episode(episode), flush=True)
            number += 1

    asyncio.run(with_team(args, work))


def cmd_serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint's adapters on a vLLM server of ours until Ctrl-C; agents' policies are the model names."""

    async def work(team: ServedTeam) -> None:
        engine = team.engines[0]
        if engine.info().kind != "vllm":
            raise SettingError("serve: needs vLLM, and this machine has none; the transformers engine has no address")
        for url in engine.info().replicas:
            print(f"url {url}")
        for name, value in engine.info().settings.items():
            print(f"{name} {value}")
        for policy, version in team.versions.items():
            print(f"policy {policy} model {version}")
        print("ready; Ctrl-C stops", flush=True)
        await asyncio.Event().wait()

    asyncio.run(with_team(args, work))


def cmd_report(args: argparse.Namespace) -> None:
    """Write report.html of a run: one file, opens from disk."""
    from marlora.rollouts.report import write_report

    for run in args.run:
        print(write_report(Path(run)))


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure, interleaved in one run, and gate every ratio on equal gradients."""
    from marlora.trainers.bench import SUITES

    if args.suite not in SUITES:
        from marlora.agents.types import nearest

        raise SettingError(f"bench {args.suite!r}: no such suite; {nearest(args.suite, SUITES)}")
    result = SUITES[args.suite](args.repeats)
    print(result.pop("table"))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def cmd_doctor(args: argparse.Namespace) -> None:
    """What this machine can do for marlora, and what to mend."""
    from marlora.recipes.doctor import examine

    rows, broken = examine()
    print(table("marlora doctor", ("part", "found", "what to do"), rows))
    if broken:
        raise SystemExit(1)


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
        args.run_command(args)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (EngineError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
