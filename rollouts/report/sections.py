"""Sections of a run's result that a training method adds: one record for terminal and report.

A method returns them in the key `report` of its `Trainer.report()`, they are stored in
`summary.json`, and both the tables printed at the end of a run and `report.html` show them; neither
knows any method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.types import from_json, to_json
from ..evaluation.rounds import transition_rows

KEY = "report"  # of summary.json


@dataclass(frozen=True)
class ReportSection:
    """A titled table of a run's result, a paragraph below it, or both.

    title: plain text. columns: heads of the table; empty without one. rows: its cells as text, as
    many in each row as there are columns. text: the paragraph.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """The section as plain JSON values, as `summary.json` holds it."""
        data: dict[str, Any] = to_json(self)
        return data


def stored(*sections: ReportSection) -> dict[str, list[dict[str, Any]]]:
    """What a method's `report()` adds to `summary.json` for these sections."""
    return {KEY: [section.to_json() for section in sections]}


def sections_of(summary: Mapping[str, Any]) -> list[ReportSection]:
    """The sections in a `summary.json`; the rounds of a run of marlora 0.1, which stored the
    numbers only, are made into one."""
    if KEY in summary:
        return [from_json(ReportSection, data, KEY) for data in summary[KEY]]
    return [rounds_section(summary["collaboration"])] if summary.get("collaboration") else []


def rounds_section(transitions: Mapping[str, Mapping[str, Any]]) -> ReportSection:
    """Accuracy of each round of sampled debates and the changes between rounds: `transitions` of
    `evaluation/rounds.py` by name, such as before and after training."""
    columns, rows = transition_rows(transitions)
    return table_section("Rounds: accuracy and changes in sampled debates, held out", columns, rows)


def accuracy_section(
    title: str, entries: Mapping[str, Mapping[str, Any]], measured: str = "held-out accuracy"
) -> ReportSection:
    """Accuracies by name, each with its interval and its difference to the first: `entries` are
    summaries of evaluations, with `paired` where they are compared. `measured` heads the names."""
    columns = (measured, "mean", "95 % interval", "tasks", "against base", "95 % interval (paired)")
    return table_section(title, columns, accuracy_rows(entries))


def accuracy_rows(entries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows (name, accuracy, 95 % interval, tasks, difference to the first, its interval)."""
    rows = []
    for name, entry in entries.items():
        row = [name, f"{entry['accuracy']:.3f}", interval(entry["ci95"]), str(entry["num_tasks"])]
        paired = entry.get("paired")
        if paired:
            row += [f"{paired['difference']:+.3f}", signed_interval(paired["ci95"])]
        else:
            row += ["", ""]
        rows.append(row)
    return rows


def interval(ends: Sequence[float]) -> str:
    """The interval of a mean as text."""
    return f"{ends[0]:.3f} .. {ends[1]:.3f}"


def signed_interval(ends: Sequence[float]) -> str:
    """The interval of a difference as text, both ends with their signs like the difference."""
    return f"{ends[0]:+.3f} .. {ends[1]:+.3f}"


LEDGER_COLUMNS = ("calls", "prompt tokens", "sampled tokens", "cached tokens", "seconds")


def ledger_sections(summary: Mapping[str, Any]) -> list[ReportSection]:
    """What a run has spent on what: by kind of episode and agent, and by policy where the two
    differ, with the budget below. None for a run of marlora 0.1, which kept no ledger."""
    ledger, by_policy = summary.get("ledger") or {}, summary.get("ledger_by_policy") or {}
    if not ledger:
        return []
    sections = [_ledger_section("What was spent", "agent", ledger, budget_text(summary))]
    names = {kind: set(rows) for kind, rows in ledger.items()}
    if by_policy and {kind: set(rows) for kind, rows in by_policy.items()} != names:
        sections.append(_ledger_section("What was spent, by policy", "policy", by_policy, ""))
    return sections


def _ledger_section(
    title: str, what: str, ledger: Mapping[str, Mapping[str, Mapping[str, Any]]], text: str
) -> ReportSection:
    """A row for each kind and agent, and the sum of every kind with several agents."""
    priced = any(row["cost"] for rows in ledger.values() for row in rows.values())
    rows = []
    for kind, own in ledger.items():
        rows += [[kind, name or "(none)", *_amounts(row, priced)] for name, row in own.items()]
        if len(own) > 1:
            total = {key: sum(row[key] for row in own.values()) for key in next(iter(own.values()))}
            rows.append([kind, "all", *_amounts(total, priced)])
    columns = ("kind", what, *LEDGER_COLUMNS, *(["cost"] if priced else []))
    return table_section(title, columns, rows, text)


def _amounts(row: Mapping[str, Any], priced: bool) -> list[str]:
    counts = [f"{row[name.replace(' ', '_')]:,.0f}" for name in LEDGER_COLUMNS]
    return [*counts, f"{row['cost']:.4f}"] if priced else counts


def budget_text(summary: Mapping[str, Any]) -> str:
    """What learning has cost (all kinds but `eval`), of how much, and whether the budget ended the
    run; "" where nothing is known."""
    budget = summary.get("budget") or {}
    spent, limit = budget.get("spent") or {}, budget.get("limit") or {}
    parts = [
        f"{spent[name]:,.12g}" + (f" of {limit[name]:,.12g}" if limit.get(name) else "") + unit
        for name, unit in (("tokens", " tokens"), ("calls", " calls"), ("cost", " of cost"))
        if name in spent and (spent[name] or limit.get(name))
    ]
    said = f"Learning, all but evaluation, has spent {', '.join(parts)}." if parts else ""
    stopped = f" The budget ended the run: {budget['stopped']}" if budget.get("stopped") else ""
    return (said + stopped).strip()


def table_section(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: str = ""
) -> ReportSection:
    """A section from lists."""
    return ReportSection(title, tuple(columns), tuple(tuple(row) for row in rows), text)
