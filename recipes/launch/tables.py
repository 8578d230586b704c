"""Tables at the end of a run and of an evaluation, as plain text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from marlora.rollouts.evaluation.rounds import transition_rows


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
    """`words`: cells hold text rather than numbers, so all columns are flush left."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 or words else "right")
    for row in rows:
        made.add_row(*row)
    return render(made, width)


def interval(low_high: Sequence[float]) -> str:
    return (
        f"{low_high[0]:+.3f} .. {low_high[1]:+.3f}"
        if min(low_high) < 0
        else f"{low_high[0]:.3f} .. {low_high[1]:.3f}"
    )


def accuracy_rows(named: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows (name, accuracy, 95 % interval, tasks, difference to the first, its interval)."""
    rows = []
    for name, entry in named.items():
        paired = entry.get("paired")
        change = (
            [
                f"{paired['difference']:+.3f}",
                f"{paired['ci95'][0]:+.3f} .. {paired['ci95'][1]:+.3f}",
            ]
            if paired
            else ["", ""]
        )
        rows.append(
            [
                name,
                f"{entry['accuracy']:.3f}",
                interval(entry["ci95"]),
                str(entry["num_tasks"]),
                *change,
            ]
        )
    return rows


def eval_rows(result: Mapping[str, Any], trained: str = "trained team") -> list[list[str]]:
    """Rows of base team, each adapter alone, best of n, trained team; `result` has their keys as
    `summary.json` does."""
    named = {"base team": result["eval"]["before"]}
    named |= {f"only {name}": entry for name, entry in result.get("adapters", {}).items()}
    if "best_of" in result:
        named[f"base team, best of {result['best_of']['n']}"] = result["best_of"]
    named[trained] = {**result["eval"]["after"], "paired": result["eval"]["paired"]}
    return accuracy_rows(named)


def calibration_table(found: Mapping[str, Any]) -> str:
    """A verifier's scores against what was right
    (`trainers/methods/reward_model/calibration.py`)."""
    rows = [
        [
            f"{b['low']:.1f} .. {b['high']:.1f}",
            str(b["num"]),
            f"{b['score']:.3f}",
            f"{b['right']:.3f}",
        ]
        for b in found["bins"]
    ]
    ranked = "" if found["ranked"] is None else f", ranked {found['ranked']:.3f}"
    return (
        table("verifier, on held-out answers", ("score", "answers", "mean score", "right"), rows)
        + f"\naccuracy {found['accuracy']:.3f} of {found['num']} answers, {found['right']:.3f} of"
        f" them right; ECE {found['ece']:.3f}, Brier {found['brier']:.3f} (a constant:"
        f" {found['brier_constant']:.3f}){ranked}"
    )


def diversity_table(found: Mapping[str, Any]) -> str:
    """How different the members of a debate are, before and after
    (`trainers/methods/imitation/diversity.py`)."""
    sides = [(side, name) for side in ("generators", "critics") for name in ("cross_nll", "kl")]
    columns = (
        "diversity",
        "consensus",
        *(f"{side}: {name.replace('_', ' ')}" for side, name in sides),
    )
    rows = []
    for when, entry in found.items():
        numbers = [entry["consensus"], *(entry.get(side, {}).get(name) for side, name in sides)]
        rows.append([when, *("" if value is None else f"{value:.3f}" for value in numbers)])
    return table(
        "sampled debates, held out: nats per token, and the share that agrees with the majority",
        columns,
        rows,
    )


def stages_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """FlowReasoner: what sampled trajectories of held-out tasks are worth as the base, after the
    warm-up and at the end."""
    names = [name for name in next(iter(stages.values())) if name != "invalid"]
    rows = [
        [
            stage,
            *("-" if found[name] is None else f"{found[name]:.3f}" for name in names),
            f"{sum(found['invalid'].values()):.3f}",
        ]
        for stage, found in stages.items()
    ]
    return table("sampled trajectories, held out", ("stage", *names, "cannot be run"), rows)


def summary_table(summary: Mapping[str, Any], folder: str) -> str:
    """What a run did, from its `summary.json`."""
    parts = []
    found = summary["eval"]
    if found["before"] and found["after"]:
        columns = (
            "held-out accuracy",
            "mean",
            "95 % interval",
            "tasks",
            "against base",
            "95 % interval (paired)",
        )
        parts.append(table(f"{summary['recipe']}: {summary['model']}", columns, eval_rows(summary)))
    if "sampled" in summary:
        found = summary["sampled"]
        columns = (
            "sampled, held out",
            "mean",
            "95 % interval",
            "tasks",
            "against base",
            "95 % interval (paired)",
        )
        named = {
            "base team": found["before"],
            "trained team": {**found["after"], "paired": found["paired"]},
        }
        parts += [
            table(
                "accuracy of the majority as the team plays in training",
                columns,
                accuracy_rows(named),
            )
        ]
        parts += [diversity_table(found["diversity"])]
    if "stages" in summary:
        parts.append(stages_table(summary["stages"]))
    if "collaboration" in summary:
        head, told = transition_rows(summary["collaboration"])
        parts.append(
            table(
                "sampled debates, held out: accuracy of rounds and changes between them", head, told
            )
        )
    if "verifier" in summary:
        parts.append(calibration_table(summary["verifier"]["calibration"]))
    rows = [
        [
            name,
            str(entry["trainable_parameters"]),
            entry["sha256_before"][:8],
            entry["sha256_after"][:8],
        ]
        for name, entry in summary["policies"].items()
    ]
    parts.append(
        table("adapters", ("policy", "trainable parameters", "hash before", "hash after"), rows)
    )
    proof, seconds, tokens = summary["live_proof"], summary["seconds"], summary["tokens"]
    parts.append(
        f"engine {summary['engine']}; {summary['steps']} steps in {seconds['total']:.0f} s (rollout"
        f" {seconds['rollout']:.0f}, train {seconds['train']:.0f}, publish"
        f" {seconds['publish']:.0f}); {tokens['sampled']} tokens sampled, {tokens['trained']}"
        " trained"
    )
    parts.append(
        f"live proof: {proof['checks']} checks, {proof['passed']} passed, {proof['untrained']}"
        f" untrained, {proof['failed']} failed, largest residual {proof['max_residual']:.3f}"
    )
    last = f"{folder}/checkpoints/step-{summary['steps']:06d}"
    parts.append(
        f"next:\n  marlora eval {last} --ablate     accuracy of every adapter on and off\n  marlora"
        f" play {last}              talk to the team"
    )
    return "\n".join(parts)
