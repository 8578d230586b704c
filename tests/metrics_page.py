"""docs/metrics.md: every metric of `metrics.jsonl`, written from the list in the code.

`python -m tests.metrics_page` writes the page; `test_metrics_page.py` compares it.
"""

from __future__ import annotations

from collections.abc import Iterable

from marlora.rollouts.report.metrics.method_names import METHOD_METRICS
from marlora.rollouts.report.metrics.metric import Metric
from marlora.rollouts.report.metrics.names import OF_CRITIC, OF_POLICY, OF_PROOF, OF_STEP
from tests.repository import ROOT

PAGE = ROOT / "docs" / "metrics.md"
HEAD = """# Metrics

What the numbers in a line of `metrics.jsonl` are. The report, the terminal and trackers (`report_to`) call them by the same words; trackers
hold them under the same names and get this list as their help. `*` stands for a policy, an agent, or another name that the run chooses.
A share goes from 0 to 1. This page is written from the code by `python -m tests.metrics_page`.
"""
GROUPS = {
    "Of a step": OF_STEP,
    "Of a policy's update": OF_POLICY,
    "Of a critic's update": OF_CRITIC,
    "Of the live proof": OF_PROOF,
    "Of single methods": METHOD_METRICS,
}


def page() -> str:
    """The page's text: a table for each group."""
    lines = [HEAD]
    for title, metrics in GROUPS.items():
        lines += [f"## {title}", "", *table(metrics), ""]
    return "\n".join(lines)


def table(metrics: Iterable[Metric]) -> list[str]:
    """Lines of a table, with a column for TRL's names where there are any."""
    metrics = list(metrics)
    trl = any(metric.trl for metric in metrics)
    heads = ["Metric", "Called", "Unit", "What it is", "Good", *(["In TRL"] if trl else [])]
    lines = [row(heads), "|" + "---|" * len(heads)]
    for each in metrics:
        other = [f"`{each.trl}`" if each.trl else ""] if trl else []
        cells = [f"`{each.name}`", each.title, each.unit, each.help, each.better, *other]
        lines.append(row(cells))
    return lines


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
