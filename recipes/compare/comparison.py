"""`marlora compare`: measures the rows that are always there, runs the arms, and writes
compare.json and compare.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marlora.agents.types import SettingError
from marlora.rollouts import files
from marlora.rollouts.report.run_data import RunData, read_json
from marlora.rollouts.rewards.builtin import resolve_rewards
from marlora.rollouts.rewards.scoring import fn_name
from marlora.trainers.errors import RunError
from marlora.trainers.loop.summary import measured_name

from .arms import Arm
from .measured import NOTHING, by_kind, run_result, stored_cost
from .page import compare_page
from .plan import ComparisonPlan, check_budget
from .reference import (
    LEAST_VOTE,
    PROMPTS,
    SINGLE,
    TEAM,
    Reference,
    comparisons_of,
    headroom,
    shown_by,
)
from .result import ArmRow, ReferenceRow, assembled
from .runs import Outcome, Say, outcomes_so_far, over_budget, run_arms

PLAN, RESULT, PAGE, HEADROOM = "plan.json", "compare.json", "compare.html", "headroom.json"


def compare_arms(plan: ComparisonPlan, say: Say, so_far: bool = False) -> dict[str, Any]:
    """Everything a plan asks for, as far as it is not there already; what stands in compare.json.
    With `so_far` no run is started: those that have not ended have no result.

    A run that fails does not keep the others from running: see `failed` of the result, and
    `check_complete`. Raises `SettingError` for a folder that holds another plan's comparison and
    for a budget below one evaluation.
    """
    claimed(plan)
    say("the team as it is, a single agent, the noise floor")
    references, noise = first_rows(plan)
    claim(plan)  # not before: a budget that is too small may be changed
    outcomes = outcomes_so_far(plan) if so_far else run_arms(plan, list(plan.runs()), say)
    return finished(plan, references, noise, outcomes, say)


def check_complete(result: Mapping[str, Any]) -> None:
    """Raise `RunError` if a run has no result."""
    if result["failed"]:
        name, why = next(iter(result["failed"].items()))
        count = len(result["failed"])
        raise RunError(f"{count} run{'s have' if count > 1 else ' has'} no result; {name}: {why}")


def compare_part(plan: ComparisonPlan, number: int, say: Say) -> None:
    """Run one of the plan's runs (in the order of `runs`), as one job of an array does. Raises
    `RunError` if it fails."""
    runs = list(plan.runs())
    if not 0 <= number < len(runs):
        raise SettingError(f"--part {number}: the plan has runs 0 to {len(runs) - 1}")
    claim(plan)
    (outcome,) = run_arms(plan, [runs[number]], say)
    if outcome.problem:
        raise RunError(f"{outcome.run.name}: {outcome.problem}")


def measure_headroom(plan: ComparisonPlan) -> dict[str, Any]:
    """Make the headroom test and keep what came out for the page."""
    claimed(plan)
    result = headroom(plan)
    kept = {"identity": plan.headroom_identity(), **result}
    files.write_text(plan.folder / HEADROOM, json.dumps(kept, indent=2) + "\n")
    return shown_by(result, comparisons_of(plan))


def kept_headroom(plan: ComparisonPlan, say: Say) -> dict[str, Any] | None:
    """What the headroom test has measured, if it was made with this plan."""
    result: dict[str, Any] | None = read_json(plan.folder / HEADROOM)
    if result is None:
        return None
    if result.pop("identity", None) != plan.headroom_identity():
        say(
            f"{plan.folder / HEADROOM}: was made with another team or other settings, so it is left"
            " out; make it again with --headroom"
        )
        return None
    return shown_by(result, comparisons_of(plan))


def claim(plan: ComparisonPlan) -> None:
    """Raise `SettingError` if the plan's folder holds what another plan has measured; else write
    down this one's."""
    identity = claimed(plan)
    files.write_text(plan.folder / PLAN, json.dumps(identity, indent=2) + "\n")


def claimed(plan: ComparisonPlan) -> dict[str, Any]:
    """The plan's identity, with the arms that its folder holds already. Raises `SettingError` if
    that holds what another plan has measured."""
    identity = plan.identity()
    if (before := read_json(plan.folder / PLAN)) is not None:
        if not isinstance(before, dict) or not {"team", "budget", "arms"} <= before.keys():
            raise SettingError(f"{plan.folder / PLAN}: is no comparison's; name another output_dir")
        check_same(before, identity, str(plan.folder))
        identity["arms"] = {**before["arms"], **identity["arms"]}
    return identity


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise `SettingError` unless two plans have the same team and budget, and the same recipes and
    settings in the arms that both have. `where`: what holds the earlier one."""
    seeds = (before.get("first_seed", now["first_seed"]), now["first_seed"])
    if seeds[0] != seeds[1]:
        raise SettingError(
            f"{where}: holds a comparison whose first seed is {seeds[0]}, with which the rows that"
            f" need no arm were played; list seed {seeds[0]} first (others may be added after it),"
            " or name another output_dir"
        )
    for key in ("team", "budget"):
        if before[key] != now[key]:
            changed = sorted(
                name
                for name in {*before[key], *now[key]}
                if before[key].get(name) != now[key].get(name)
            )
            raise SettingError(
                f"{where}: holds the comparison of another plan, with another {key}"
                f" ({', '.join(changed)}); name another output_dir"
            )
    for name in before["arms"].keys() & now["arms"].keys():
        if before["arms"][name] != now["arms"][name]:
            raise SettingError(
                f"{where}: holds arm {name!r} with another recipe or other settings; give the arm"
                " another name, or name another output_dir"
            )


# rows


def first_rows(plan: ComparisonPlan) -> tuple[list[ReferenceRow], dict[str, Any]]:
    """The rows that need no arm, and the noise floor. Raises `SettingError` if the budget is below
    one evaluation of the team."""
    with Reference(plan, plan.folder / "reference") as reference:
        team = reference.team()
        check_budget(plan.budget, plan.choice_tasks, tokens=team.tokens, calls=team.calls)
        rows = [ReferenceRow(TEAM, team), ReferenceRow(SINGLE, reference.single())]
        if chosen := reference.hand_prompts():
            number, spent, measurement = chosen
            note = f"number {number + 1} of {len(plan.prompts)}, chosen on validation tasks"
            rows.append(ReferenceRow(PROMPTS, measurement, note, spent))
        return rows, reference.noise()


def vote_rows(plan: ComparisonPlan, tokens: float) -> list[ReferenceRow]:
    """Self-consistency of the single agent and of the team at so many tokens per task."""
    with Reference(plan, plan.folder / "reference") as reference:
        return [
            ReferenceRow(
                name,
                measurement,
                vote_note(samples, tokens),
                samples=samples if samples >= LEAST_VOTE else 1,
            )
            for name, (samples, measurement) in reference.votes(tokens).items()
        ]


def vote_note(samples: int, tokens: float) -> str:
    """How a row of self-consistency came about."""
    if samples >= LEAST_VOTE:
        return f"majority of {samples} sampled answers, at most {tokens:,.0f} tokens per task"
    return (
        f"no vote: {tokens:,.0f} tokens per task pay for {samples} sampled"
        f" {'answer' if samples == 1 else 'answers'}, a majority takes {LEAST_VOTE}; it answered"
        " once, at temperature 0"
    )


def finished(
    plan: ComparisonPlan,
    references: Sequence[ReferenceRow],
    noise: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    say: Say,
) -> dict[str, Any]:
    """The result of all runs that have ended, written as JSON and as a page."""
    arms = [row for arm in plan.arms.values() if (row := arm_row(plan, arm, outcomes)) is not None]
    # at the price of the dearest arm, so that no arm is compared with less than it uses itself
    dearest = max(
        (row.measurement.tokens for row in arms), default=references[0].measurement.tokens
    )
    tokens = max(dearest, plan.vote_tokens)
    say(f"self-consistency at {tokens:,.0f} tokens per task")
    result = assembled(
        plan,
        [*references, *vote_rows(plan, tokens)],
        arms,
        noise,
        failed=failures(plan, outcomes),
        metric=measured_name(resolve_rewards(plan.config.rewards)[0]),
        headroom=kept_headroom(plan, say),
    )
    result["bill"] = bill(plan)
    if plan.vote_tokens > dearest:
        result["vote_tokens"] = plan.vote_tokens
    files.write_text(plan.folder / RESULT, json.dumps(result, indent=2) + "\n")
    files.write_text(plan.folder / PAGE, compare_page(result), errors="replace")
    return result


def bill(plan: ComparisonPlan) -> list[dict[str, Any]]:
    """What the whole comparison has taken, runs without a result included: calls, tokens, cost."""
    rows = [
        {"what": what, **stored_cost(plan.folder / name)}
        for what, name in (("reference rows", "reference"), ("headroom test", "headroom"))
        if (plan.folder / name / "episodes").is_dir()
    ]
    kinds = [
        by_kind(RunData.read(run.folder).summary.get("ledger") or {})
        for run in plan.runs()
        if (run.folder / "config.yaml").is_file()
    ]
    for kind in ("learning", "evaluation"):
        sums = {key: sum(own[kind][key] for own in kinds) for key in NOTHING}
        rows.append({"what": f"runs of the arms, {kind}", **sums})
    return rows


def arm_row(plan: ComparisonPlan, arm: Arm, outcomes: Sequence[Outcome]) -> ArmRow | None:
    """What the finished runs of an arm came to; None if none has finished."""
    runs = [each.run for each in outcomes if each.run.arm is arm and not each.problem]
    metric = fn_name(resolve_rewards(plan.config.rewards)[0])
    results = [run_result(RunData.read(run.folder, metric=metric), run.seed) for run in runs]
    return ArmRow(arm, results) if results else None


def failures(plan: ComparisonPlan, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """By run, why it has no result, or by how much it is over its budget."""
    problems = {
        each.run.name: each.problem
        or (f"over its budget, {over}" if (over := over_budget(plan, each.run)) else "")
        for each in outcomes
    }
    return {name: problem for name, problem in problems.items() if problem}
