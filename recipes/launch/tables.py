"""Tables at the end of a run and of an evaluation, as plain text."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from marlora.rollouts.report.sections import (
    ReportSection,
    accuracy_section,
    ledger_sections,
    sections_of,
    table_section,
)


def terminal_width(otherwise: int) -> int:
    """Columns of the terminal that stdout is, or that COLUMNS says; `otherwise` in files, pipes and
    logs."""
    if not (os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty()):
        return otherwise
    return max(40, shutil.get_terminal_size((otherwise, 24)).columns)


def render(table: Table, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: bool = False,
    width: int = 110,
) -> str:
    """A table as text, as wide as the terminal; no cell is cut, long ones go over several lines.

    `words`: cells hold text rather than numbers, so all columns are flush left. `width`: where
    there is no terminal.
    """
    grid = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        grid.add_column(
            column, justify="left" if number == 0 or words else "right", overflow="fold"
        )
    for row in rows:
        grid.add_row(*row)
    return render(grid, terminal_width(width))


def section_text(section: ReportSection) -> str:
    """A section as a table and the paragraph below it."""
    parts = [table(section.title, section.columns, section.rows)] if section.columns else []
    parts += [section.text] if section.text else []
    return "\n".join(parts if section.columns else [section.title, *parts])


def accuracy_entries(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Evaluations in `summary.json` by the name of what was measured: base team, each adapter
    alone, best of n, trained team."""
    entries = {"base team": summary["eval"]["before"]}
    entries |= {f"only {name}": entry for name, entry in summary.get("adapters", {}).items()}
    if "best_of" in summary:
        entries[f"base team, best of {summary['best_of']['n']}"] = summary["best_of"]
    entries["trained team"] = {**summary["eval"]["after"], "paired": summary["eval"]["paired"]}
    return entries


def summary_table(
    summary: Mapping[str, Any],
    folder: str,
    flags: Sequence[str] = (),
    play_flags: Sequence[str] = (),
) -> str:
    """What a run did, from its `summary.json`: accuracy, the method's own sections, adapters, what
    was spent, why it ended early, time and live proof; and the commands to go on with.

    `flags`: words that those commands need to open the checkpoint; `play_flags`: more of them for
    `marlora play`.
    """
    sections = []
    if summary["eval"]["before"] and summary["eval"]["after"]:
        title = f"{summary['recipe']}: {summary['model'] or 'outside models'}"
        measured = f"held-out {summary.get('measured', 'accuracy')}"
        sections.append(accuracy_section(title, accuracy_entries(summary), measured))
    learning = any(entry["trainable_parameters"] for entry in summary["policies"].values())
    sections += [*sections_of(summary), *([_adapters(summary["policies"])] if learning else [])]
    last = f"{folder}/checkpoints/step-{summary['steps']:06d}"
    evaluate = shlex.join(["marlora", "eval", last, *(["--ablate"] if learning else []), *flags])
    play = shlex.join(["marlora", "play", last, *flags, *play_flags])
    width = max(len(evaluate), len(play))
    finding = [summary["finding"]] if summary.get("finding") else []
    return "\n".join(
        [
            *finding,
            *map(section_text, sections),
            *spent_lines(summary),
            *([f"the run ended early: {summary['done']}"] if summary.get("done") else []),
            _resources(summary),
            *_live_proof(summary["live_proof"]),
            "next:",
            f"  {evaluate:{width}}  # "
            + ("accuracy of every adapter on and off" if learning else "accuracy of the team"),
            f"  {play:{width}}  # talk to the team",
        ]
    )


def spent_lines(summary: Mapping[str, Any]) -> list[str]:
    """Tables of what was spent on what, with the budget; none for a run that kept no ledger."""
    return [section_text(section) for section in ledger_sections(summary)]


def _adapters(policies: Mapping[str, Mapping[str, Any]]) -> ReportSection:
    rows = [
        [
            name,
            str(entry["trainable_parameters"]),
            entry["sha256_before"][:8],
            entry["sha256_after"][:8],
        ]
        for name, entry in policies.items()
    ]
    columns = ("policy", "trainable parameters", "hash before", "hash after")
    return table_section("adapters", columns, rows)


def _resources(summary: Mapping[str, Any]) -> str:
    seconds, tokens = summary["seconds"], summary["tokens"]
    return (
        f"engine {summary['engine']}; {summary['steps']} steps in {seconds['total']:.0f} s (rollout"
        f" {seconds['rollout']:.0f}, train {seconds['train']:.0f}, publish"
        f" {seconds['publish']:.0f}); {tokens['sampled']} tokens sampled, {tokens['trained']}"
        " trained"
    )


def _live_proof(proof: Mapping[str, Any]) -> list[str]:
    """A line about the live proof; none where there was nothing to prove."""
    if proof["checks"]:
        return [
            f"live proof: {proof['checks']} checks, {proof['passed']} passed, {proof['untrained']}"
            f" untrained, {proof['failed']} failed, largest residual {proof['max_residual']:.3f}"
        ]
    if proof.get("identity"):
        return ["live proof: nothing was trained; the adapters served are those of their folders"]
    return []
