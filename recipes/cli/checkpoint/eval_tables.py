"""Tables of `marlora eval` as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marlora.recipes.launch.tables import table
from marlora.rollouts.evaluation.rounds import transition_rows
from marlora.rollouts.report.sections import interval, signed_interval

WIDTH = 140  # of the plain text: variants have long names
Table = tuple[str, tuple[str, ...], list[list[str]]]  # title, columns, rows


def as_text(result: Mapping[str, Any]) -> str:
    return "\n".join(table(*each, width=WIDTH) for each in tables(result))


def as_markdown(result: Mapping[str, Any]) -> str:
    """A document of all tables, with what was evaluated and how at its head."""
    lines = ["# Evaluation", ""]
    lines += [f"- `{mark}`: {path}" for mark, path in result["checkpoints"].items()]
    lines += [
        (
            f"- engine {result['engine']}, {'sampled' if result['sampled'] else 'temperature 0'},"
            f" metric `{result['metric']}`"
        ),
        "",
    ]
    for title, columns, rows in tables(result):
        lines += [
            f"## {title}",
            "",
            row_of(columns),
            row_of(["---", *["---:"] * (len(columns) - 1)]),
        ]
        lines += [*(row_of([cell.replace("|", "\\|") for cell in row]) for row in rows), ""]
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Every table that has something to say, by task set."""
    for name, measured in result["sets"].items():
        yield accuracies(result["metric"], name, measured)
        for entry in (
            between(measured),
            parts(measured),
            costs(measured),
            over_samples(measured),
            *crossed(measured),
            rounds(measured),
            seeds(measured),
        ):
            if entry[2]:
                yield entry


def accuracies(metric: str, name: str, measured: Mapping[str, Any]) -> Table:
    against = {
        row["to"]: row for row in reversed(measured["comparisons"])
    }  # the first one of a name is the base's
    columns = (
        metric,
        "mean",
        "95 % interval",
        "tasks",
        "against base",
        "95 % interval (paired)",
        "p (Holm)",
    )
    rows = []
    for variant, row in measured["contestants"].items():
        change = against.get(variant)
        change_cells = (
            [
                signed(change["difference"]),
                signed_interval(change["ci95"]),
                p_value(change["p_holm"]),
            ]
            if change
            else ["", "", ""]
        )
        rows.append(
            [
                variant,
                f"{row['accuracy']:.3f}",
                interval(row["ci95"]),
                str(row["num_tasks"]),
                *change_cells,
            ]
        )
    rows += [
        [f"{other} (= {first})", "", "", "", "", "", ""]
        for other, first in measured["same_as"].items()
    ]
    drawn = (
        f", {measured['samples']} samples x {len(measured['seeds'])} seeds"
        if measured["samples"] * len(measured["seeds"]) > 1
        else ""
    )
    return f"{name}: {measured['tasks']} tasks{drawn}", columns, rows


def between(measured: Mapping[str, Any]) -> Table:
    """Trained teams against one another."""
    columns = ("paired", "difference", "95 % interval", "gained", "lost", "p", "p (Holm)")
    base = measured["comparisons"][0]["from"] if measured["comparisons"] else ""
    rows = [
        [
            f"{row['to']} - {row['from']}",
            signed(row["difference"]),
            signed_interval(row["ci95"]),
            str(row["gained"]),
            str(row["lost"]),
            p_value(row["p"]),
            p_value(row["p_holm"]),
        ]
        for row in measured["comparisons"]
        if row["from"] != base
    ]
    return "Trained teams against each other", columns, rows


def parts(measured: Mapping[str, Any]) -> Table:
    """Means of all rewards, where there are several."""
    variants = measured["contestants"]
    names = list(dict.fromkeys(name for row in variants.values() for name in row["rewards"]))
    rows = [
        [each, *(number(row["rewards"].get(name)) for name in names)]
        for each, row in variants.items()
    ]
    return "Reward parts", ("mean", *names), rows if len(names) > 1 else []


def costs(measured: Mapping[str, Any]) -> Table:
    columns = (
        "per task",
        "calls",
        "prompt tokens",
        "sampled tokens",
        "seconds",
        "p95",
        "failed",
        "agreement",
        "different answers",
    )
    rows = []
    for variant, row in measured["contestants"].items():
        cost, seconds = row["cost"], row["cost"]["seconds"]
        counts = [f"{cost[key]:.1f}" for key in ("calls", "prompt_tokens", "sampled_tokens")]
        shares = [
            share(row["agreement"]),
            share(row["diversity"]["samples"] or row["diversity"]["agents"]),
        ]
        rows.append(
            [
                variant,
                *counts,
                f"{seconds['mean']:.2f}",
                f"{seconds['p95']:.2f}",
                str(row["failed"]),
                *shares,
            ]
        )
    return "Cost, agreement, diversity", columns, rows


def over_samples(measured: Mapping[str, Any]) -> Table:
    rows, ks = [], list(next(iter(measured["contestants"].values())).get("pass_at", {}))
    for variant, row in measured["contestants"].items():
        if ks:
            rows.append(
                [
                    variant,
                    *(f"{row['pass_at'][k]:.3f}" for k in ks),
                    *(f"{row['majority_at'][k]:.3f}" for k in ks[1:]),
                ]
            )
    return (
        "Over samples",
        ("", *(f"pass@{k}" for k in ks), *(f"majority@{k}" for k in ks[1:])),
        rows,
    )


def crossed(measured: Mapping[str, Any]) -> list[Table]:
    matrices = []
    for policy, matrix in measured["cross_play"].items():
        marks = list(matrix)
        rows = [
            [f"{policy} of {mark}", *(f"{matrix[mark][other]:.3f}" for other in marks)]
            for mark in marks
        ]
        matrices.append(
            (f"Cross-play of {policy}", ("", *(f"others of {mark}" for mark in marks)), rows)
        )
    return matrices


def rounds(measured: Mapping[str, Any]) -> Table:
    transitions = {
        name: row["transitions"]
        for name, row in measured["contestants"].items()
        if row["transitions"]
    }
    head, rows = transition_rows(transitions)
    return "Answers from round to round", tuple(head), rows


def seeds(measured: Mapping[str, Any]) -> Table:
    if len(measured["seeds"]) < 2:
        return "", (), []
    rows = [
        [name, *(f"{value:.3f}" for value in row["by_seed"].values())]
        for name, row in measured["contestants"].items()
    ]
    return "By seed", ("", *(f"seed {seed}" for seed in measured["seeds"])), rows


def signed(value: float) -> str:
    return f"{value:+.3f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def p_value(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"
