"""What MAS-GPT's systems and designs come to on queries: accuracy in which a crash counts 0, how
many replies hold a program, how many of these run, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .....agents.programs.mas_gpt import FELL_BACK, call_cost
from .....agents.programs.program import PROGRAM
from .....rollouts.evaluation.statistics import Evaluation, paired
from .....rollouts.report.sections import ReportSection, accuracy_section, table_section
from .....rollouts.types import Episode


def pool_row(result: Evaluation, episodes: Sequence[Episode]) -> dict[str, float]:
    """Of one system on queries: its accuracy, calls of executors per query, and runs without an
    answer, which score 0."""
    crashed = [
        e for e in episodes if e.failed or any(o.name == PROGRAM and o.error for o in e.operations)
    ]
    calls = sum(len(episode.turns) for episode in episodes)
    return {
        "score": result.accuracy,
        "calls": calls / len(episodes),
        "crashed": len(crashed),
        "unscored": result.failed,
    }


def designs(episodes: Sequence[Episode], designer: str) -> dict[str, float]:
    """Means over episodes of a `MASGPT`.

    extractable: the reply holds a fenced program. runnable: the program runs and gives an answer.
    fallback: another program gave the answer. cost: calls of executors, and half of one for each
    generation. An episode that failed is neither extractable nor runnable.
    """
    found, ran, fell, cost = 0, 0, 0, 0.0
    for episode in episodes:
        valid = [r for r in episode.rewards if r.name == "valid"]
        found += any(r.value or not r.text.startswith("missing") for r in valid)
        ran += any(r.name == "ran" and r.value for r in episode.rewards)
        fell += any(o.name == FELL_BACK for o in episode.operations)
        written = len(episode.trajectory(designer))
        cost += call_cost(written, len(episode.turns) - written)
    names = ("extractable", "runnable", "fallback", "cost")
    return {
        name: n / len(episodes) for name, n in zip(names, (found, ran, fell, cost), strict=True)
    }


def comparison(
    results: Mapping[str, Evaluation], rows: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], list[ReportSection]]:
    """Evaluations of the same tasks by name, the last one compared with all others, and `designs`
    of some.

    Returns `numbers` for the summary and `lines` for people, and the sections of the report.
    """
    *others, last = results
    numbers: dict[str, Any] = {
        name: {**result.summary(), **rows.get(name, {})} for name, result in results.items()
    }
    for name in others:
        numbers[name]["last_against_it"] = paired(results[name], results[last])
    shown = {name: result.summary() for name, result in results.items()}
    for name in [*others[1:], last]:
        shown[name]["paired"] = paired(results[others[0]], results[name])
    title = "Held-out queries as the team plays"
    table = [
        [name, *(f"{row[key]:.3f}" for key in ("extractable", "runnable", "fallback", "cost"))]
        for name, row in rows.items()
    ]
    columns = ("replies", "with a program", "that runs", "answered by the fallback", "calls")
    sections = [
        accuracy_section(title, shown, "sampled"),
        table_section("What the designer wrote for them", columns, table),
    ]
    lines = [f"{name}: {result.accuracy:.3f} sampled" for name, result in results.items()]
    return {"numbers": numbers, "lines": lines}, sections
