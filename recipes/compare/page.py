"""compare.html: a comparison as one page that opens from disk, in the look of the report, without
any script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marlora.rollouts.report.charts import Line, chart
from marlora.rollouts.report.html import page, section, table, text, whisker
from marlora.rollouts.report.tables import accuracy_with_interval, difference_with_interval

from .reference import SINGLE, TEAM, VOTES
from .result import headline
from .tables import (
    AGAINST,
    Table,
    bill,
    comparison_of,
    controls,
    costs,
    curves,
    facts,
    noise,
    p_value,
    policies,
    roles,
    without_result,
)

THOUSAND = 1000  # tokens of a unit of the curves: ticks of five digits have no room
READING = """Every arm starts with the same team, unless its row says
that it has a system of its own, sees the same training and validation tasks and
has the same budget; held-out tasks are never seen by a method. Intervals are 95 %, over tasks and,
where there are several seeds, over seeds. With one seed they say nothing of other seeds.
Differences are paired by task; p-values are corrected for the number of all comparisons of this
page (Holm), so one that stays below .05 stands among all of them. Self-consistency samples each
task as often as the tokens per task of the dearest arm pay for, or those that the plan names where
these are more, and takes the majority's answer; where they pay for fewer than three samples there
is no vote, and its row says so. An arm is set against its control on the seeds that both have. A
difference below the noise floor is none."""


def compare_page(result: Mapping[str, Any]) -> str:
    """The page as text. Whatever a plan, a model or an error wrote is escaped."""
    sections = [
        section("Headroom", _headroom(result.get("headroom") or {}), name="headroom"),
        section("Held-out scores", _scores(result), name="scores"),
        section("Paired differences", _differences(result), name="differences"),
        _section(controls(result), "controls"),
        _section(noise(result), "noise"),
        _section(costs(result), "costs"),
        _section(roles(result), "roles"),
        _section(policies(result), "policies"),
        _section(curves(result), "ends"),
        _section(bill(result), "bill"),
        section(
            "Curves <small>score against tokens spent on learning</small>",
            _curves(result),
            "grid",
            "curves",
        ),
        section("No result", _failed(result["failed"]), name="failed"),
        section("How to read this page", f"<p>{text(READING)}</p>", name="reading"),
    ]
    names = {
        "scores": "Scores",
        "differences": "Differences",
        "costs": "Costs",
        "curves": "Curves",
        "failed": "No result",
    }
    nav = "".join(
        f'<a href="#{name}">{label}</a>'
        for name, label in names.items()
        if any(f'id="{name}"' in each for each in sections)
    )
    head = (
        f"<header><h1>Comparison <small>{text(result['plan'])}</small></h1>"
        f'<p class="verdict"><b>{text(headline(result))}</b></p>'
        f"<p>{text(facts(result))}</p></header>"
    )
    body = f"<nav>{nav}</nav><main>{head}{''.join(sections)}</main>"
    return page(f"Comparison: {result['plan']}", body, script="")


def _section(content: Table, name: str) -> str:
    title, columns, rows = content
    if not rows:
        return ""
    cells = [list(map(text, row)) for row in rows]
    return section(text(title), table(list(map(text, columns)), cells), name=name)


def _headroom(result: Mapping[str, Any]) -> str:
    if not result:
        return ""
    rows = [
        ("team as it is", result["team"]),
        (f"best of {result['best_of']['samples']} by the reward", result["best_of"]["score"]),
        *([("other model", result["other_model"])] if "other_model" in result else []),
        ("smallest difference that can be shown", result["detectable"]),
    ]
    cells = [(text(name), f"{value:.3f}") for name, value in rows]
    return f"<p>{text(result['summary'])}</p>" + table(("", f"{result['tasks']} tasks"), cells)


def _scores(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        low, high = row["ci95"]
        entry = {"accuracy": row["score"], "ci95": row["ci95"]}
        below = row.get("share_below_team")
        seeds = " ".join(f"{value:.3f}" for value in row["by_seed"].values())
        note = row.get("note") or _description(row, result)
        rows.append(
            (
                f'<b>{text(row["name"])}</b><span class="why">{text(note)}</span>',
                accuracy_with_interval(entry),
                whisker(row["score"], low, high) if low >= 0 and high <= 1 else "",
                text(seeds) if row["kind"] != "reference" else "",
                "" if below is None else f"{below:.0%}",
            )
        )
    head = ("", "mean, 95 % interval", "0 to 1", "by seed", "seeds below the team")
    return table(head, rows)


def _description(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The recipe of an arm, a system of its own, whether the budget ended it, and whether it began
    as the team does."""
    if row["kind"] == "reference":
        return ""
    control = f", control of {row['control_of']}" if row["control_of"] else ""
    ended = "; the budget ended it" if row["stopped"] else ""
    noise = result["noise"]["greedy"]["largest_difference"]
    other = abs(row["starts_at"] - row["team_there"]) > noise + 1e-9
    start = f"; starts at {row['starts_at']:.3f}, so not as the team does" if other else ""
    own = f"; a system of its own, {row['system']}" if row.get("system") else ""
    return f"{row['recipe']}{control}{own}{ended}{start}"


def _differences(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        cells = [_difference(comparison_of(result, other, row["name"])) for other in AGAINST]
        if any(cells):
            rows.append((f"<b>{text(row['name'])}</b>", *cells))
    return table(("", *(f"against {name}" for name in AGAINST)), rows) if rows else ""


def _difference(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return ""
    shown = comparison["p_holm"] < 0.05
    kind = ("good" if comparison["difference"] > 0 else "bad") if shown else "soft"
    p = text(f"p {p_value(comparison['p_holm'])}")
    return f'{difference_with_interval(comparison)} <span class="{kind}">{p}</span>'


def _curves(result: Mapping[str, Any]) -> str:
    """A figure for each arm and kind of tasks: a line per seed, the team as it is, and both rows of
    self-consistency."""
    level = {row["name"]: row["score"] for row in result["rows"]}
    figures = []
    for name, kinds in result["curves"].items():
        for kind, seeds in kinds.items():
            lines = {
                f"seed {seed}": Line([(x / THOUSAND, y) for x, y in own])
                for seed, own in seeds.items()
            }
            colours = {line: f"c{number % 4}" for number, line in enumerate(lines)}
            end = max((x / THOUSAND for own in seeds.values() for x, _ in own), default=0.0)
            flat = {"team": TEAM, "vote, team": VOTES[TEAM], "vote, single": VOTES[SINGLE]}
            for line, row in flat.items() if kind == "held-out" and end else ():
                if row in level:
                    lines[line] = Line([(0.0, level[row]), (end, level[row])])
                    colours[line] = {"team": "c6", "vote, team": "c4"}.get(line, "c5")
            figures.append(
                chart(
                    name,
                    f"{kind}, over thousand tokens",
                    lines,
                    colours,
                    own_legend=True,
                    unit="thousand tokens",
                )
            )
    return "".join(figures)


def _failed(failed: Mapping[str, str]) -> str:
    rows = [
        (text(names), f'<span class="why">{text(why)}</span>')
        for names, why in without_result(failed)
    ]
    return table(("runs", "why"), rows) if rows else ""
