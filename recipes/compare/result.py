"""`compare.json`: the rows of a comparison with their numbers, as plain JSON, from which page and
tables are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .arms import Arm
from .measured import Measurement, Point, RunResult, Scores, mean_of
from .plan import ComparisonPlan
from .reference import PROMPTS, SINGLE, TEAM, VOTES
from .statistics import (
    LEVEL,
    Pair,
    by_seed,
    mean,
    mean_interval,
    pair,
    pair_by_seed,
    share_below,
    tested,
)

VERSION = 2  # of the file's format


@dataclass(frozen=True)
class ReferenceRow:
    """A row that every comparison has. note: how it was made. spent: tokens of choosing it.
    samples: answers of which the most frequent one counts; 1 is no vote."""

    name: str
    measurement: Measurement
    note: str = ""
    spent: float = 0.0
    samples: int = 1


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
            *(_arm(row, comparisons, pairs, voted_rows(references)) for row in arms),
        ],
        "comparisons": comparisons,
        "failed": dict(failed),
        "curves": {row.arm.name: _curves(row.results) for row in arms},
    }


def compared(references: Sequence[ReferenceRow], arms: Sequence[ArmRow]) -> list[Pair]:
    """Every arm against the team as it is and against self-consistency of the single agent and of
    the team; hand-written prompts against the team; and arms against their controls and against
    those that they name."""
    known = {row.name: row.measurement.scores for row in references}
    own = {row.arm.name: row.measurement.scores for row in arms}
    others = [TEAM, VOTES[SINGLE], VOTES[TEAM]]
    if VOTES[TEAM] not in voted_rows(references):
        others.remove(VOTES[TEAM])  # it is the team as it is
    pairs = [
        pair(other, name, known[other], scores)
        for name, scores in own.items()
        for other in others
        if other in known
    ]
    if PROMPTS in known:
        pairs.append(pair(TEAM, PROMPTS, known[TEAM], known[PROMPTS]))
    for row in arms:
        arm = row.arm
        for first, second in ((arm.name, arm.control_of), (arm.compared_with, arm.name)):
            if first in own and second in own:
                both = pair_by_seed(first, second, own[first], own[second])
                pairs += [both] if both else []
    return pairs


def voted_rows(references: Sequence[ReferenceRow]) -> list[str]:
    """The rows of self-consistency for which there are tokens to vote."""
    return [row.name for row in references if row.name in VOTES.values() and row.samples > 1]


def _reference(row: ReferenceRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": "reference",
        "note": row.note,
        **_measured(row.measurement),
        "spent": {"tokens": row.spent},
        "samples": row.samples,
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


def _team_there(scores: Mapping[int, Scores], base: Pair) -> float:
    """What the team as it is scores on the tasks of an arm, whose seeds hold out others: the mean
    over seeds."""
    return fmean(
        fmean(scores[seed][task] - difference for task, difference in own.items())
        for seed, own in base.differences.items()
    )


def _arm(
    row: ArmRow,
    comparisons: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    voted: Sequence[str],
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
        "team_there": _team_there(row.measurement.scores, base),
        "share_below_team": share_below(base),
        "effect": effect(effects[TEAM]),
        "against_votes": {other: effect(effects[other]) for other in voted if other in effects},
        "spent": {
            key: fmean(result.spent.get(key, 0) for result in results)
            for key in ("tokens", "calls", "cost")
        },
        "by_role": _roles(results),
        "by_policy": _policies(results),
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


def _policies(results: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """Metrics of every policy's updates, in the mean over the runs that trained it."""
    names = dict.fromkeys(name for result in results for name in result.by_policy)
    table: dict[str, dict[str, float]] = {}
    for name in names:
        own = [result.by_policy[name] for result in results if name in result.by_policy]
        table[name] = {key: fmean(each[key] for each in own) for key in own[0]}
    return table


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
    above, below = effects.count("above"), effects.count("below")
    total = len(arms)
    return (
        f"Of {total} {'arm' if total == 1 else 'arms'}, {above} {_are(above)} shown to be above the"
        f" team as it is, {below} below it; for {effects.count('not shown')} no difference is"
        f" shown. {_against_votes(result, arms)}"
    )


def _against_votes(result: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    """How the arms stand against the rows of self-consistency that are a vote."""
    names = {VOTES[TEAM]: "the team", VOTES[SINGLE]: "the single agent"}
    of = {row["name"]: row["samples"] for row in result["rows"] if row["name"] in names}
    voted = [names[name] for name in names if of.get(name, 1) > 1]
    tokens = result.get("vote_tokens")
    paid = f"{tokens:,} tokens per task" if tokens else "the tokens of the dearest arm"
    if not voted:
        return f"{paid[0].upper()}{paid[1:]} pay for no vote of three answers."
    shown = [set(row["against_votes"].values()) for row in arms]
    better, worse = shown.count({"above"}), sum("below" in each for each in shown)
    both = len(voted) == 2
    return (
        f"At {paid}, {better} {_are(better)} shown to be above"
        f" self-consistency of {'both ' * both}{' and '.join(voted)}, {worse} below"
        f" {'one of them' if both else 'it'}{'' if both else '; there is no other vote'}."
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
