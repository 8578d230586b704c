"""`compare.json`: the rows of a comparison with their numbers, as plain JSON, from which page and
tables are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .arms import Arm
from .measured import Measurement, Point, RunResult, mean_of
from .plan import ComparisonPlan
from .reference import SINGLE, TEAM, VOTES
from .statistics import LEVEL, Pair, by_seed, mean, mean_interval, pair, share_below, tested

VERSION = 1  # of the file's format


@dataclass(frozen=True)
class ReferenceRow:
    """A row that every comparison has. note: how it was made. spent: tokens of choosing it."""

    name: str
    measurement: Measurement
    note: str = ""
    spent: float = 0.0


@dataclass(frozen=True)
class ArmRow:
    """An arm and what its finished runs came to, of which there is at least one."""

    arm: Arm
    results: Sequence[RunResult]

    @property
    def measurement(self) -> Measurement:
        return mean_of([result.after for result in self.results])


def assembled(
    plan: ComparisonPlan,
    references: Sequence[ReferenceRow],
    arms: Sequence[ArmRow],
    noise: Mapping[str, Any],
    *,
    failed: Mapping[str, str],
    metric: str,
    headroom: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All of `compare.json`. `failed`: why an arm, or a seed of it, has no result, by name."""
    pairs = compared(references, arms)
    comparisons = tested(pairs)
    return {
        "version": VERSION,
        "plan": plan.name,
        "identity": plan.identity(),
        "metric": metric,
        "tasks": plan.config.tasks,
        "model": plan.config.model,
        "seeds": list(plan.seeds),
        "budget": plan.limits(),
        "headroom": dict(headroom) if headroom else None,
        "noise": dict(noise),
        "rows": [
            *(_reference(row) for row in references),
            *(_arm(row, comparisons, pairs) for row in arms),
        ],
        "comparisons": comparisons,
        "failed": dict(failed),
        "curves": {row.arm.name: _curves(row.results) for row in arms},
    }


def compared(references: Sequence[ReferenceRow], arms: Sequence[ArmRow]) -> list[Pair]:
    """Every arm against the team as it is and against self-consistency of the single agent and of
    the team; and against its control."""
    known = {row.name: row.measurement.scores for row in references}
    own = {row.arm.name: row.measurement.scores for row in arms}
    pairs = []
    for row in arms:
        name = row.arm.name
        pairs += [
            pair(other, name, known[other], own[name])
            for other in (TEAM, VOTES[SINGLE], VOTES[TEAM])
            if other in known
        ]
    for row in arms:
        if row.arm.control_of in own:
            name, control = row.arm.control_of, row.arm.name
            pairs.append(pair(control, name, own[control], own[name]))
    return pairs


def _reference(row: ReferenceRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": "reference",
        "note": row.note,
        **_measured(row.measurement),
        "spent": {"tokens": row.spent},
    }


def _measured(measurement: Measurement) -> dict[str, Any]:
    scores = measurement.scores
    calls = measurement.calls
    return {
        "score": mean(scores),
        "ci95": list(mean_interval(scores)),
        "by_seed": {str(seed): value for seed, value in by_seed(scores).items()},
        "num_tasks": len({task for own in scores.values() for task in own}),
        "tokens_per_task": measurement.tokens,
        "calls_per_task": calls,
        "prompt_tokens_per_call": measurement.prompt_tokens / calls if calls else 0.0,
    }


def _arm(
    row: ArmRow, comparisons: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]
) -> dict[str, Any]:
    name, results = row.arm.name, row.results
    base = next(each for each in pairs if (each.first, each.second) == (TEAM, name))
    effects = {each["from"]: each for each in comparisons if each["to"] == name}
    start = fmean(mean(result.before.scores) for result in results)
    return {
        "name": name,
        "kind": "control" if row.arm.control_of else "arm",
        "recipe": row.arm.recipe,
        "control_of": row.arm.control_of,
        "system": row.arm.system,
        **_measured(row.measurement),
        "starts_at": start,
        "share_below_team": share_below(base),
        "effect": effect(effects[TEAM]),
        "against_votes": {
            other: effect(effects[other]) for other in VOTES.values() if other in effects
        },
        "spent": {
            key: fmean(result.spent.get(key, 0) for result in results)
            for key in ("tokens", "calls", "cost")
        },
        "by_role": _roles(results),
        "tokens_trained": fmean(result.trained for result in results),
        "seconds": fmean(result.seconds for result in results),
        "steps": fmean(result.steps for result in results),
        "stopped": [result.stopped for result in results if result.stopped],
    }


def effect(comparison: Mapping[str, Any]) -> str:
    """What a comparison shows at 5 %, corrected: `above`, `below` or `not shown`."""
    if comparison["p_holm"] >= LEVEL:
        return "not shown"
    return "above" if comparison["difference"] > 0 else "below"


def _roles(results: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """What learning has cost by agent and helper, in the mean over the runs."""
    names = dict.fromkeys(name for result in results for name in result.by_role)
    return {
        name: {
            key: fmean(result.by_role.get(name, {}).get(key, 0) for result in results)
            for key in ("tokens", "calls", "cost")
        }
        for name in names
    }


def _curves(results: Sequence[RunResult]) -> dict[str, dict[str, list[Point]]]:
    """Points (tokens spent, score) by kind of tasks and seed. Validation has a curve where it was
    measured more than once."""
    curves: dict[str, dict[str, list[Point]]] = {"held-out": {}, "validation": {}}
    for result in results:
        curves["held-out"][str(result.seed)] = list(result.held_out)
        if len(result.validation) > 1:
            curves["validation"][str(result.seed)] = list(result.validation)
    return {kind: own for kind, own in curves.items() if own}


def headline(result: Mapping[str, Any]) -> str:
    """What came out, in three sentences."""
    arms = [row for row in result["rows"] if row["kind"] == "arm"]
    if not arms:
        return "No arm has a result."
    effects = [row["effect"] for row in arms]
    votes = [set(row["against_votes"].values()) for row in arms]
    above, below = effects.count("above"), effects.count("below")
    better, worse = votes.count({"above"}), sum("below" in shown for shown in votes)
    total = len(arms)
    return (
        f"Of {total} {'arm' if total == 1 else 'arms'}, {above} {_are(above)} shown to be above the"
        f" team as it is, {below} below it; for {effects.count('not shown')} no difference is"
        f" shown. At the tokens of the dearest arm, {better} {_are(better)} shown to be above"
        f" self-consistency of both the team and the single agent, {worse} below one of them."
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
