"""Calibration of a verifier: scores from 0 to 1 against what was right, held out. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from ....rollouts.report.sections import ReportSection, table_section


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer: its task's id, the score it got, and whether it is right."""

    task: str
    score: float
    right: bool


def calibration(judged: Sequence[ScoredAnswer], bins: int = 10) -> dict[str, Any]:
    """What scores are worth, as plain values for `summary.json`.

    num, right: answers, and the share of right ones.
    accuracy: of "right if the score is at least 0.5".
    brier: mean (score - right)^2, beside `brier_constant`, that of always giving the share of right
        ones.
    ece: expected calibration error, the mean over bins, by size, of |mean score - share right|.
    ranked: of all pairs of a right and a wrong answer to one task, the share where the right one
        scores higher (a tie is half); None without such pairs. It is 0.5 for a verifier that knows
        how hard a task is and nothing else.
    bins: per bin that is not empty its bounds, number, mean score and share right.
    """
    if not judged:
        raise ValueError("calibration: no answers; expected at least one")
    total, share = len(judged), sum(j.right for j in judged) / len(judged)
    cells: dict[int, list[ScoredAnswer]] = {}
    for each in judged:
        cells.setdefault(min(int(each.score * bins), bins - 1), []).append(each)
    rows = []
    for k, cell in sorted(cells.items()):
        score, right = _mean([j.score for j in cell]), _mean([j.right for j in cell])
        rows.append(
            {
                "low": k / bins,
                "high": (k + 1) / bins,
                "num": len(cell),
                "score": score,
                "right": right,
            }
        )
    pairs = [
        (good.score > bad.score) + 0.5 * (good.score == bad.score)
        for _, same in groupby(sorted(judged, key=lambda j: j.task), key=lambda j: j.task)
        for good, bad in product(*_split(list(same)))
    ]
    return {
        "num": total,
        "right": share,
        "accuracy": _mean([(j.score >= 0.5) == j.right for j in judged]),
        "brier": _mean([(j.score - j.right) ** 2 for j in judged]),
        "brier_constant": share * (1 - share),
        "ece": sum(row["num"] * abs(row["score"] - row["right"]) for row in rows) / total,
        "ranked": _mean(pairs) if pairs else None,
        "bins": rows,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _split(judged: Sequence[ScoredAnswer]) -> tuple[list[ScoredAnswer], list[ScoredAnswer]]:
    return [j for j in judged if j.right], [j for j in judged if not j.right]


def calibration_section(numbers: Mapping[str, Any]) -> ReportSection:
    """`calibration` as a table of its bins, for the terminal and the report."""
    rows = [
        [
            f"{b['low']:.1f} .. {b['high']:.1f}",
            str(b["num"]),
            f"{b['score']:.3f}",
            f"{b['right']:.3f}",
        ]
        for b in numbers["bins"]
    ]
    ranked = "" if numbers["ranked"] is None else f", ranked {numbers['ranked']:.3f}"
    text = (
        f"accuracy {numbers['accuracy']:.3f} of {numbers['num']} answers, {numbers['right']:.3f} of"
        f" them right; ECE {numbers['ece']:.3f}, Brier {numbers['brier']:.3f} (a constant:"
        f" {numbers['brier_constant']:.3f}){ranked}"
    )
    columns = ("score", "answers", "mean score", "right")
    return table_section("verifier, on held-out answers", columns, rows, text)
