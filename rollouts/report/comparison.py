"""Several runs side by side: accuracy, a paired test of what they came to, shared curves, and the
settings in which they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.statistics import Evaluation, paired, sign_flip_p
from .charts import Line, chart
from .curves import MetricCurve, banded, metric_curves
from .html import group, legend, number, section, table, text
from .run_data import TEAM, RunData, results
from .tables import accuracy_with_interval, colours, difference_with_interval

HEAD = (
    "run",
    "recipe",
    "before",
    "after",
    "paired difference",
    "steps",
    "tokens sampled",
    "tokens spent on learning",
    "seconds",
)


def comparison(runs: Sequence[RunData]) -> str:
    """A row for each run, paired tests, their curves in shared charts, and their differing
    settings."""
    colour = colours([run.name for run in runs])
    rows = [_row(run, n, colour[run.name]) for n, run in enumerate(runs)]
    body = [
        section("Side by side", table(HEAD, rows)),
        section("Against the first run, on the same tasks", difference_table(runs, colour)),
        section("Over the steps", legend(colour) + _curves(runs, colour)),
        section("Settings", _differing_settings(runs)),
    ]
    return group("Runs compared", "".join(body), "compare")


# paired tests


def paired_tests(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The last evaluation of every run's whole team against the first run's, by the same reward
    and on the tasks, of the same id and prompt, that both were evaluated on: `run`, `against`,
    `tasks`, `difference`, `ci95`, `gained`, `lost` and `p` (sign-flip test, two-sided); nothing
    for a run without such tasks."""
    first, *others = runs
    base, found = last_evaluation(first), list[dict[str, Any]]()
    for run in others:
        scores, asked = last_evaluation(run), _prompts(run)
        shared = [t for t, prompt in _prompts(first).items() if asked.get(t) == prompt]
        shared = [task for task in shared if task in base and task in scores]
        if shared and run.metric == first.metric:
            one, other = (Evaluation({t: s[t] for t in shared}) for s in (base, scores))
            differences = [scores[task] - base[task] for task in shared]
            found.append(
                {
                    "run": run.name,
                    "against": first.name,
                    "tasks": len(shared),
                    **paired(one, other),
                    "p": sign_flip_p(differences),
                }
            )
    return found


def last_evaluation(run: RunData) -> Mapping[str, float]:
    """Scores by task of the last evaluation of the whole team; the one before training where there
    is no other."""
    made = results(run.episodes, run.evaluations, TEAM)
    later = [made[label] for label in made if label != "before"]
    return (later or list(made.values()))[-1].scores if made else {}


def _prompts(run: RunData) -> dict[str, str]:
    """How the prompts of the evaluated tasks begin."""
    return {row.task: row.prompt for row in run.episodes if row.kind == "eval"}


def difference_table(runs: Sequence[RunData], colour: Mapping[str, str]) -> str:
    """The paired tests as a table and a line on how to read it."""
    rows = [
        (
            f'<span class="{colour[test["run"]]}">{text(test["run"])}</span>',
            number(test["tasks"]),
            difference_with_interval(test),
            number(test["gained"]),
            number(test["lost"]),
            number(test["p"]),
        )
        for test in paired_tests(runs)
    ]
    if not rows:
        return (
            "<p>The runs were not evaluated by one reward on the same tasks, so no test is"
            " possible.</p>"
        )
    head = ("run", "tasks", f"difference to {text(runs[0].name)}", "gained", "lost", "p")
    note = (
        '<p class="soft">p: how often random signs of the tasks\' differences would give a mean'
        " as far from 0 (two-sided); not corrected for several runs, and of one seed each.</p>"
    )
    return table(head, rows) + note


def _row(run: RunData, n: int, colour: str) -> tuple[str, ...]:
    result, summary = run.summary.get("eval") or {}, run.summary
    accuracies = [
        accuracy_with_interval(entry) if entry else "–"
        for entry in (result.get("before"), result.get("after"))
    ]
    paired = result.get("paired")
    return (
        f'<a class="{colour}" href="#run-{n}">{text(run.name)}</a>',
        text(run.title),
        *accuracies,
        difference_with_interval(paired) if paired else "–",
        number(summary.get("steps")),
        number((summary.get("tokens") or {}).get("sampled")),
        number(((summary.get("budget") or {}).get("spent") or {}).get("tokens")),
        number(round((summary.get("seconds") or {}).get("total", 0))),
    )


def _measured(runs: Sequence[RunData]) -> str:
    """What the runs' evaluations measure, all of the names if they differ."""
    return ", ".join(dict.fromkeys(run.summary.get("measured", "accuracy") for run in runs))


def _curves(runs: Sequence[RunData], colour: Mapping[str, str]) -> str:
    evals = {run.name: banded(run.eval_points()) for run in runs}
    rewards = {run.name: banded(run.reward_points()) for run in runs}
    outcome = chart(f"held-out {_measured(runs)}", "95 % interval", evals, colour) + chart(
        "reward", "training, 95 % interval", rewards, colour
    )
    shared = shared_curves(runs, colour)
    shown = "".join(c.chart() for c in shared if not c.constant and not c.metric.detail)
    more = "".join(c.chart() for c in shared if not c.constant and c.metric.detail)
    folded = (
        f'<details class="wide"><summary>More curves</summary><div class="grid">{more}</div>'
        "</details>"
    )
    return f'<div class="grid top">{outcome}{shown}{folded * bool(more)}</div>'


def shared_curves(runs: Sequence[RunData], colour: Mapping[str, str]) -> list[MetricCurve]:
    """The metrics that at least two runs have, with a line for each run: of policies their mean."""
    by_metric: dict[str, dict[str, MetricCurve]] = defaultdict(dict)
    for run in runs:
        for curve in metric_curves(run):
            by_metric[curve.metric.name][run.name] = curve
    return [
        MetricCurve(
            next(iter(own.values())).metric,
            {name: mean_line(curve.lines) for name, curve in own.items()},
            colour,
        )
        for own in by_metric.values()
        if len(own) > 1
    ]


def mean_line(lines: Mapping[str, Line]) -> Line:
    """The mean over policies at each step, of those that have a value there."""
    values: dict[float, list[float]] = defaultdict(list)
    for line in lines.values():
        for step, value in line.points:
            values[step].append(value)
    return Line([(step, sum(own) / len(own)) for step, own in sorted(values.items())])


def _differing_settings(runs: Sequence[RunData]) -> str:
    keys = dict.fromkeys(
        k
        for run in runs
        for k in run.config
        if any(k not in r.config or r.config[k] != run.config[k] for r in runs)
    )
    if not keys:
        return ""
    rows = [
        (f"<code>{text(key)}</code>", *(text(run.config.get(key, "–"), 120) for run in runs))
        for key in keys
    ]
    settings = table(("setting", *(text(run.name) for run in runs)), rows)
    return f"<details><summary>{len(rows)} settings differ</summary>{settings}</details>"
