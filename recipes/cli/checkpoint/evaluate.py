"""`marlora eval`: checkpoints against the base, against each other and rung by rung, with intervals
and paired tests.

    # base team and trained team
    marlora eval RUN/checkpoints/step-000004
    # the ladder, and the two against each other
    marlora eval A/checkpoints/step-000004 B/checkpoints/step-000020
    # every rung and adapter, pass@k and majority@k
    marlora eval CHECKPOINT --ladder --ablate --samples 8

Every finished episode is kept in `--output`, so that a suite that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlora.agents.concurrency import run_steadily
from marlora.agents.state import TeamState
from marlora.agents.types import PolicySpec, SettingError, Task, from_json
from marlora.recipes.cli.checkpoint.eval_tables import as_markdown, as_text
from marlora.recipes.cli.checkpoint.team import (
    add_json,
    add_team,
    asked_for,
    chosen,
    engine_config,
    load_options,
    run_seed,
    say,
    show,
    write_json,
)
from marlora.rollouts.checkpoints.reader import read_checkpoint
from marlora.rollouts.checkpoints.team import LoadedTeam, load_team
from marlora.rollouts.evaluation.statistics import paired
from marlora.rollouts.evaluation.suite import (
    Measured,
    Plan,
    Tick,
    Variant,
    compare,
    prompt_hash,
    seen,
    suite,
)
from marlora.rollouts.evaluation.variants import (
    ablations,
    base_team,
    cross_play,
    distinct,
    ladder,
    trained_on,
    trained_team,
)
from marlora.rollouts.rewards.gold import check_answers
from marlora.trainers.monitoring.progress import Progress


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `marlora eval`."""
    add_team(parser, several=True)
    _add_measured(parser.add_argument_group("what is measured"))
    _add_output(parser.add_argument_group("output"))


def _add_measured(group: argparse._ArgumentGroup) -> None:
    def flag(name: str, help: str) -> None:
        group.add_argument(name, action="store_true", help=help)

    group.add_argument(
        "--tasks",
        nargs="+",
        default=[""],
        help="other task sets, one table each; default is the checkpoint's held-out tasks",
    )
    group.add_argument("--num_tasks", type=int, default=None, help="at most so many of each set")
    flag(
        "--ladder",
        "also the rungs below: single agent, team without prompts, base team, values-only team;"
        " always of several checkpoints",
    )
    flag("--ablate", "also each adapter alone, and all but each")
    flag("--cross", "also teams of agents from two checkpoints: the cross-play matrix")
    flag("--sampled", "at the run's temperature instead of 0")
    group.add_argument(
        "--samples",
        type=int,
        default=1,
        help="samples of each task, for pass@k and majority@k; sampled",
    )
    group.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=None,
        help="several seeds instead of --seed; sampled",
    )
    group.add_argument(
        "--trained_on",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="more runs or stores whose tasks may not be evaluated on",
    )
    flag("--allow_trained_tasks", "evaluate on tasks that were trained on all the same")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        default="",
        help="folder of episodes, eval.json and eval.md; default is eval/ in the first run",
    )
    add_json(group)
    group.add_argument("--markdown", default="", help="write the tables here too")


def cmd_eval(args: argparse.Namespace) -> None:
    """Held-out accuracy of checkpoints, paired against the base team and each other; goes on where
    it was stopped."""
    if args.markdown and not Path(args.markdown).absolute().parent.is_dir():
        raise SettingError(f"--markdown {args.markdown}: no such folder")
    if args.cross and len(args.checkpoint) < 2:
        raise SettingError("--cross: takes agents of two checkpoints; name at least two")
    args.sampled = args.sampled or args.samples > 1 or len(args.seeds or ()) > 1
    folder = Path(args.output) if args.output else beside(Path(args.checkpoint[0]))
    result = run_steadily(evaluate_all(args, folder))
    show(args.json, as_text(result))
    write_json(args.json, result)
    write_json(str(folder / "eval.json"), result)
    for path in filter(None, (args.markdown, folder / "eval.md")):
        Path(path).write_text(as_markdown(result), encoding="utf-8")
    say(f"episodes, eval.json and eval.md: {folder}")


def beside(checkpoint: Path) -> Path:
    """`eval/` in the checkpoint's run, or beside a checkpoint that lies alone."""
    parent = checkpoint.resolve().parent
    return (parent.parent if parent.name == "checkpoints" else parent) / "eval"


def marks_of(checkpoints: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: the run's folder, the step, or both, as far as it takes to
    tell them apart."""
    paths = [Path(name).resolve() for name in checkpoints]
    if len(set(paths)) < len(paths):
        raise SettingError(
            "eval: a checkpoint is named twice; two different ones are needed to compare"
        )
    runs = [
        p.parent.parent.name if p.parent.name == "checkpoints" else p.parent.name for p in paths
    ]
    steps = [p.name for p in paths]
    for names in (runs, steps, [f"{run}/{step}" for run, step in zip(runs, steps, strict=True)]):
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]


async def evaluate_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Open every checkpoint, on one engine where they share a base, and measure all variants on
    all task sets."""
    marks = marks_of(args.checkpoint)
    data = [read_checkpoint(Path(name)) for name in args.checkpoint]
    args.seed = run_seed(args.seed, data[0])
    for each in data:  # before a server starts
        asked_for(
            args.adapters,
            [name for name, entry in each["adapters"].items() if entry.get("trained")],
        )
    guests = [
        from_json(PolicySpec, spec) for each in data[1:] for spec in each["policies"].values()
    ]
    with tempfile.TemporaryDirectory(prefix="marlora-") as scratch:
        teams: dict[str, LoadedTeam] = {}
        options = load_options(args, scratch, guests)
        try:
            for mark, checkpoint in zip(marks, args.checkpoint, strict=True):
                teams[mark] = await load_team(
                    checkpoint, engine_config(args), options, beside=list(teams.values())
                )
            for mark, team in teams.items():
                if not has_learnt(team, chosen(team, args.adapters)):
                    say(f"{mark}: no adapter is on and no value was learnt: it is the base team")
            sets = {}
            for name in args.tasks:
                tasks = tasks_for(args, teams, name)
                sets[name or next(iter(teams.values())).data["tasks"]["name"]] = await one_set(
                    args, teams, tasks, folder
                )
        finally:
            for team in reversed(teams.values()):
                await team.close()
    return summary_of(args, teams, sets)


def has_learnt(team: LoadedTeam, state: TeamState) -> bool:
    """Whether anything of this state was learnt: an adapter that is on, or values."""
    return bool(state.versions) or state.values != team.origin


def tasks_for(args: argparse.Namespace, teams: Mapping[str, LoadedTeam], name: str) -> list[Task]:
    """The tasks to evaluate on; refuses those that a checkpoint may have been trained on."""
    first = next(iter(teams.values()))
    tasks = first.tasks(name, args.num_tasks)
    for warning in check_answers(tasks, first.rollouts.rewards[:1], "held-out"):
        say(f"warning: {warning}")
    for (mark, team), checkpoint in zip(teams.items(), args.checkpoint, strict=True):
        asked, where = trained_on(Path(checkpoint), team, args.trained_on)
        if not where:
            say(
                f"warning: {mark} does not say what it was trained on, so these tasks may not be"
                " new to it"
            )
        known = seen(tasks, set(asked), {prompt_hash(prompt) for prompt in asked.values()})
        if known and not args.allow_trained_tasks:
            raise SettingError(
                f"tasks {name or team.data['tasks']['name']!r}: {len(known)} of {len(tasks)} were"
                f" trained on by {mark}, such as {known[0]!r} ({', '.join(where)}); name other"
                " tasks, or give --allow_trained_tasks"
            )
    return tasks


async def one_set(
    args: argparse.Namespace, teams: Mapping[str, LoadedTeam], tasks: Sequence[Task], folder: Path
) -> dict[str, Any]:
    """All variants on one task set: their rows, the comparisons and the cross-play matrices."""
    metric = next(iter(teams.values())).metric
    plan = Plan(
        tuple(tasks), metric, tuple(args.seeds or [args.seed]), args.samples, not args.sampled
    )
    requested: list[Variant] = []
    trained: list[str] = []
    rungs = {
        mark: ladder(team) if args.ladder or len(teams) > 1 else [base_team(team)]
        for mark, team in teams.items()
    }
    requested += below(rungs, plan)
    for mark, team in teams.items():
        prefix, state = f"{mark}: " if len(teams) > 1 else "", chosen(team, args.adapters)
        requested += ablations(team, state.versions, prefix) if args.ablate else []
        if has_learnt(team, state):
            requested.append(trained_team(team, state.versions, prefix))
            trained.append(requested[-1].name)
    crossed = cross_play(teams) if args.cross else []
    requested += [each for *_, each in crossed]
    variants, same = distinct(requested, plan.seeds[0], plan.greedy)
    progress = Progress()
    progress.start(0, 0)
    try:
        measured = await suite(
            variants,
            plan,
            folder,
            lambda name, total, done: bar(progress, name, total, done, metric),
        )
    finally:
        progress.close()
    measured |= {name: measured[first] for name, first in same.items()}
    return {
        "tasks": len(tasks),
        "samples": args.samples,
        "seeds": list(plan.seeds),
        "same_as": same,
        "contestants": {each.name: measured[each.name].row for each in variants},
        "comparisons": compare(pairs(measured, variants, trained, same)),
        "cross_play": matrices(teams, crossed, measured, trained),
        "first": first_pair(measured, variants, trained),
    }


def below(rungs: Mapping[str, Sequence[Variant]], plan: Plan) -> list[Variant]:
    """The rungs of all checkpoints: once where they are the same team, else once for each, with the
    checkpoint's name."""
    variants = []
    for name in dict.fromkeys(each.name for own in rungs.values() for each in own):
        own = {
            mark: each for mark, several in rungs.items() for each in several if each.name == name
        }
        if len({each.key(plan.seeds[0], plan.greedy) for each in own.values()}) == 1:
            variants.append(next(iter(own.values())))
        else:
            variants += [replace(each, name=f"{mark}: {name}") for mark, each in own.items()]
    return variants


@contextlib.contextmanager
def bar(progress: Progress, name: str, total: int, done: int, metric: str) -> Iterator[Tick]:
    """A bar, and a line in a log when it was not all there already."""
    with progress.episodes(name, total, done, metric) as tick:
        yield tick
    progress.say(
        f"{name}: {total} episodes" + (f", {done} of them from an earlier call" if done else "")
    )


def pairs(
    measured: Mapping[str, Measured],
    variants: Sequence[Variant],
    trained: Sequence[str],
    same: Mapping[str, str],
) -> list[tuple[Measured, Measured]]:
    """The first base team against every other variant, then trained teams against one
    another."""
    base = next(each.name for each in variants if each.name.endswith("base team"))
    names = [each.name for each in variants if each.name != base]
    ahead = [name for name in trained if name not in same]
    between = [(a, b) for n, a in enumerate(ahead) for b in ahead[n + 1 :]]
    return [(measured[a], measured[b]) for a, b in [*((base, name) for name in names), *between]]


def matrices(
    teams: Mapping[str, LoadedTeam],
    crossed: Sequence[tuple[str, str, str, Variant]],
    measured: Mapping[str, Measured],
    trained: Sequence[str],
) -> dict[str, Any]:
    """By policy: accuracy by the checkpoint the adapter is from (rows) and that of the others
    (columns)."""
    own = dict(zip(teams, trained, strict=False))
    tables: dict[str, Any] = {}
    for policy, guest, host, each in crossed:
        table = tables.setdefault(
            policy, {mark: {mark: measured[own[mark]].evaluation.accuracy} for mark in teams}
        )
        table[guest][host] = measured[each.name].evaluation.accuracy
    return tables


def first_pair(
    measured: Mapping[str, Measured], variants: Sequence[Variant], trained: Sequence[str]
) -> dict[str, Any]:
    """Base and trained team of the first checkpoint in the words of `summary.json`, and its
    adapters alone."""
    base = next(m for m in measured.values() if m.name.endswith("base team"))
    after = measured[trained[0]] if trained else base
    prefix = after.name.partition("trained team")[0] if trained else ""
    alone = {
        each.name.removeprefix(f"{prefix}only "): measured[each.name]
        for each in variants
        if each.name.startswith(f"{prefix}only ")
    }
    return {
        "eval": {
            "before": base.evaluation.summary(),
            "after": after.evaluation.summary(),
            "paired": paired(base.evaluation, after.evaluation),
        },
        "adapters": {
            name: {**each.evaluation.summary(), "paired": paired(base.evaluation, each.evaluation)}
            for name, each in alone.items()
        },
    }


def summary_of(
    args: argparse.Namespace, teams: Mapping[str, LoadedTeam], sets: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What goes into JSON: the first checkpoint's numbers as a run's `summary.json` has them, then
    everything by task set."""
    team = next(iter(teams.values()))
    firsts = [each.pop("first") for each in sets.values()]
    return {
        "checkpoint": str(args.checkpoint[0]),
        "checkpoints": dict(zip(teams, map(str, args.checkpoint), strict=True)),
        "metric": team.metric,
        "tasks": next(iter(sets)),
        "seed": args.seed,
        "sampled": args.sampled,
        "engine": team.engines[0].info().kind if team.engines else "none",
        "adapters_on": list(chosen(team, args.adapters).versions),
        **firsts[0],
        "sets": json.loads(json.dumps(sets)),
    }
