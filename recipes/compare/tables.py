"""Tables of a comparison, from compare.json: as text, as Markdown, and the cells of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from marlora.recipes.launch.tables import table
from marlora.rollouts.report.sections import interval, signed_interval

from .reference import SINGLE, TEAM, VOTES
from .result import headline

WIDTH = 150  # of the plain text
Table = tuple[str, tuple[str, ...], list[list[str]]]  # title, columns, rows
AGAINST = {
    TEAM: "- team",
    VOTES[SINGLE]: "- self-consistency, single",
    VOTES[TEAM]: "- self-consistency, team",
}


def as_text(result: Mapping[str, Any]) -> str:
    parts = [headline(result)]
    parts += [f"headroom: {result['headroom']['summary']}"] if result.get("headroom") else []
    parts += [table(*each, width=WIDTH) for each in tables(result)]
    parts += [*notes(result), *own_systems(result)]
    parts += [f"no result: {names}: {why}" for names, why in without_result(result["failed"])]
    return "\n".join(parts)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, with what was compared above them."""
    lines = [headline(result), "", facts(result), ""]
    lines += [f"- {line}" for line in notes(result)]
    lines += [""] if notes(result) else []
    if result.get("headroom"):
        lines += [f"Headroom: {result['headroom']['summary']}", ""]
    for _, columns, rows in tables(result):
        lines += [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
        lines += [*map(_line, rows), ""]
    lines += [f"- {line}" for line in own_systems(result)]
    lines += [f"- no result: {names}: {why}" for names, why in without_result(result["failed"])]
    return "\n".join(lines).rstrip() + "\n"


def without_result(failed: Mapping[str, str]) -> list[tuple[str, str]]:
    """(runs, why): the runs that have no result, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, why in failed.items():
        names.setdefault(why, []).append(name)
    return [("; ".join(own), why) for why, own in names.items()]


def notes(result: Mapping[str, Any]) -> list[str]:
    """A line for every reference row that says how it was made."""
    return [f"{row['name']}: {row['note']}" for row in result["rows"] if row.get("note")]


def own_systems(result: Mapping[str, Any]) -> list[str]:
    """A line for every arm that does not play the team's system."""
    return [
        f"{row['name']} has a system of its own: {row['system']}"
        for row in result["rows"]
        if row.get("system")
    ]


def facts(result: Mapping[str, Any]) -> str:
    """What was compared, in a sentence."""
    limits = ", ".join(f"{value:,} {name}" for name, value in result["budget"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"{result['model'] or 'outside models'} on {result['tasks']}; held-out {result['metric']}"
        f" with 95 % intervals over tasks and seeds; seeds {seeds}; budget of a run: {limits};"
        f" p-values corrected for {len(result['comparisons'])} comparisons (Holm)."
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Every table that has a row."""
    every = [scores(result), controls(result), noise(result)]
    every += [costs(result), roles(result), policies(result), curves(result), bill(result)]
    return [each for each in every if each[2]]


def scores(result: Mapping[str, Any]) -> Table:
    """Held-out scores and paired differences."""
    columns = ("", "held out", "95 %", *AGAINST.values(), "seeds below team")
    rows = []
    for row in result["rows"]:
        cells = [row["name"], f"{row['score']:.3f}", interval(row["ci95"])]
        cells += [_difference(result, other, row["name"]) for other in AGAINST]
        below = row.get("share_below_team")
        rows.append([*cells, "" if below is None else f"{below:.0%}"])
    return "Held-out scores", columns, rows


def costs(result: Mapping[str, Any]) -> Table:
    """What learning took, and what a task takes afterwards."""
    paid = any(row["spent"].get("cost") for row in result["rows"])
    columns = (
        "",
        "tokens to learn",
        *(["money"] if paid else []),
        "tokens trained",
        "tokens per task",
        "prompt tokens per call",
        "seconds",
    )
    rows = []
    for row in result["rows"]:
        money = [f"{row['spent'].get('cost', 0):.4g}"] if paid else []
        learnt = row["kind"] != "reference"
        rows.append(
            [
                row["name"],
                f"{row['spent']['tokens']:,.0f}",
                *money,
                f"{row['tokens_trained']:,.0f}" if learnt else "",
                f"{row['tokens_per_task']:,.1f}",
                f"{row['prompt_tokens_per_call']:,.1f}",
                f"{row['seconds']:,.0f}" if learnt else "",
            ]
        )
    return "Costs (means over seeds)", columns, rows


def roles(result: Mapping[str, Any]) -> Table:
    """Tokens of learning by agent and helper, with the money where there are prices."""
    arms = [row for row in result["rows"] if row.get("by_role")]
    names = list(dict.fromkeys(name for row in arms for name in row["by_role"]))
    rows = [
        [row["name"], *(_spending(row["by_role"].get(name, {})) for name in names)] for row in arms
    ]
    return "Tokens to learn, by role", ("", *(name or "(none)" for name in names)), rows


def policies(result: Mapping[str, Any]) -> Table:
    """How steep the updates of every policy were, and how often it was called."""
    rows = [
        [f"{row['name']}: {name}", f"{own['grad_norm']:.3g}", f"{own['calls_per_episode']:.2f}"]
        for row in result["rows"]
        for name, own in row.get("by_policy", {}).items()
    ]
    columns = ("arm: policy", "gradient norm", "calls per episode")
    return "Updates by policy (means over steps and seeds)", columns, rows


def curves(result: Mapping[str, Any]) -> Table:
    """Where held-out curves of several points began, were highest and ended, in the mean over
    seeds: a peak of many points is in part luck."""
    rows = []
    for name, kinds in result["curves"].items():
        seeds = [[score for _, score in points] for points in kinds.get("held-out", {}).values()]
        if min(map(len, seeds), default=0) > 2:
            first, top, last = (
                fmean(map(of, seeds)) for of in (itemgetter(0), max, itemgetter(-1))
            )
            rows.append([name, f"{first:.3f}", f"{top:.3f}", f"{last:.3f}", f"{last - top:+.3f}"])
    columns = ("", "first", "highest", "last", "last - highest")
    return "Held-out curves (means over seeds)", columns, rows


def bill(result: Mapping[str, Any]) -> Table:
    """What the whole comparison has taken, the rows that need no arm included."""
    entries = result.get("bill", ())
    paid = any(entry["cost"] for entry in entries)
    rows = [
        [
            entry["what"],
            f"{entry['calls']:,.0f}",
            f"{entry['tokens']:,.0f}",
            *([f"{entry['cost']:.4g}"] if paid else []),
        ]
        for entry in entries
    ]
    columns = ("", "calls", "tokens", *(["money"] if paid else []))
    return "The whole comparison", columns, rows


def controls(result: Mapping[str, Any]) -> Table:
    """Arms against their controls, and against arms that they name."""
    arms = {row["name"] for row in result["rows"] if row["kind"] != "reference"}
    rows = [
        [f"{each['to']} - {each['from']}", str(len(each["by_seed"])), *_cells(each)]
        for each in result["comparisons"]
        if {each["from"], each["to"]} <= arms
    ]
    columns = ("", "seeds of both", "difference", "95 %", "p (Holm)")
    return "Arms against their controls and each other", columns, rows


def noise(result: Mapping[str, Any]) -> Table:
    """The team as it is, measured again and again."""
    rows = [
        [
            f"noise floor, {name}",
            " ".join(f"{value:.3f}" for value in floor["means"]),
            f"{floor['sd']:.4f}",
            f"{floor['largest_difference']:.3f}",
        ]
        for name, floor in result["noise"].items()
    ]
    columns = ("same state, other random numbers", "scores", "sd", "largest difference")
    return "Noise floor", columns, rows


def comparison_of(result: Mapping[str, Any], first: str, second: str) -> Mapping[str, Any] | None:
    """The comparison of two rows, if there is one."""
    named = (e for e in result["comparisons"] if e["from"] == first and e["to"] == second)
    return next(named, None)


def p_value(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _difference(result: Mapping[str, Any], first: str, second: str) -> str:
    each = comparison_of(result, first, second)
    if each is None:
        return ""
    difference, ends, p = _cells(each)
    return f"{difference} ({ends}), p {p}"


def _cells(each: Mapping[str, Any]) -> list[str]:
    ends = signed_interval(each["ci95"])
    return [f"{each['difference']:+.3f}", ends, p_value(each["p_holm"])]


def _spending(role: Mapping[str, float]) -> str:
    if not role:
        return ""
    money = f" ({role['cost']:.4g})" if role.get("cost") else ""
    return f"{role['tokens']:,.0f}{money}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
