"""Curves of the report: what a run's metrics and episodes say over its steps.

Every metric is drawn under the title, and with the help, of the list of metrics. What tells nothing
is folded away: constant ones into a table, noise around one level and what only developers read
behind a fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Line, chart
from .html import is_number, legend, number, table, text
from .metrics.metric import Group, Metric, words
from .metrics.names import METRICS, metric_of
from .metrics.trends import is_constant, is_noise
from .run_data import TEAM, VALIDATION, PointWithInterval, RunData
from .tables import METRIC_KEYS_ELSEWHERE, colours

# keys of a row of metrics.jsonl that have a chart of their own, or none
PLACED = {"step", "reward", "reward_min", "reward_max", "episodes", "sampled_tokens", "critics"}
TIME_COLOURS = {"rollout": "c3", "train": "c4", "publish": "c5"}  # parts of a step's time
NO_POLICY = {"": "c6"}  # colour of a curve of the whole run


@dataclass(frozen=True)
class MetricCurve:
    """A metric over the steps: a line for each policy, or one of the whole run."""

    metric: Metric
    lines: Mapping[str, Line]
    colours: Mapping[str, str]

    @property
    def values(self) -> list[list[float]]:
        """The values of each line that has any."""
        return [[v for _, v in line.points] for line in self.lines.values() if line.points]

    @property
    def constant(self) -> bool:
        """Has no line ever changed, but for rounding?"""
        small = self.metric.rounding
        return all(is_constant(line) or max(map(abs, line)) <= small for line in self.values)

    @property
    def folded(self) -> bool:
        """Is it for developers, or noise that says nothing of the run's health?"""
        noise = all(is_noise(line) or is_constant(line) for line in self.values)
        return self.metric.detail or (noise and self.metric.group == "health")

    def chart(self) -> str:
        return chart(self.metric.title, self.metric.note, self.lines, self.colours)

    def row(self) -> tuple[str, str, str]:
        """Title, last value of each line, help, as a row of a table."""
        last = {name: line.points[-1][1] for name, line in self.lines.items() if line.points}
        same = len(set(last.values())) == 1
        value = (
            number(next(iter(last.values())))
            if same
            else " · ".join(f"{text(name)} <b>{number(v)}</b>" for name, v in last.items())
        )
        return text(self.metric.title), value, text(self.metric.note)


def group_curves(run: RunData, group: Group) -> str:
    """A grid of the charts that belong to one of the report's groups; "" if there are none."""
    own = [curve for curve in metric_curves(run) if curve.metric.group == group]
    moving = [curve for curve in own if not curve.constant]
    shown = {"learning": outcome_charts, "health": policy_legend, "cost": cost_charts}[group](run)
    shown += "".join(curve.chart() for curve in moving if not curve.folded)
    body = shown + _fold(
        [curve for curve in moving if curve.folded], [curve for curve in own if curve.constant]
    )
    return f'<div class="grid top">{body}</div>' if body else ""


def _fold(moving: Sequence[MetricCurve], constant: Sequence[MetricCurve]) -> str:
    """Curves of detail or noise, and a table of what never changed, each behind a fold."""
    folds = ""
    if moving:
        charts = f'<div class="grid">{"".join(curve.chart() for curve in moving)}</div>'
        folds += _folded(f"{_counted(len(moving))} for developers, or noise", charts)
    if constant:
        rows = [curve.row() for curve in constant]
        folds += _folded(
            f"{_counted(len(constant))} that never changed",
            table(("", "value", "what it is"), rows),
        )
    return folds


def _counted(count: int) -> str:
    return f"{count} more curve{'s' * (count > 1)}"


def _folded(summary: str, body: str) -> str:
    return f'<details class="wide"><summary>{summary}</summary>{body}</details>'


# the curves of single metrics


def metric_curves(run: RunData) -> list[MetricCurve]:
    """All of them, listed metrics first and in the list's order."""
    found = [*policy_curves(run), *proof_curves(run), *run_curves(run)]
    order = {metric.name: place for place, metric in enumerate(METRICS)}
    return sorted(found, key=lambda curve: order.get(curve.metric.name, len(order)))


def policy_curves(run: RunData) -> Iterator[MetricCurve]:
    """A curve for every key of the policies' rows that is a number."""
    colour = colours(list(run.policies))
    keys = dict.fromkeys(
        k for row in run.metrics for own in (row.get("policies") or {}).values() for k in own
    )
    for key in keys:
        metric = metric_of(("policies", "", key)) or Metric(
            f"policies/*/{key}", words([key]), "", "", detail=True
        )
        if any((lines := per_policy(run, key))[name].points for name in run.policies):
            yield MetricCurve(metric, lines, colour)


def proof_curves(run: RunData) -> Iterator[MetricCurve]:
    """How far the served adapters were from the trained ones."""
    metric, lines = metric_of(("proof", "", "residual")), per_policy(run, "residual", "proof")
    if metric is not None and any(line.points for line in lines.values()):
        yield MetricCurve(metric, lines, colours(list(run.policies)))


def run_curves(run: RunData) -> Iterator[MetricCurve]:
    """A curve for every other number of a row, under the words of its keys if it is not listed."""
    elsewhere = PLACED | METRIC_KEYS_ELSEWHERE
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in run.metrics:
        for path, value in numbers({k: v for k, v in row.items() if k not in elsewhere}):
            found.setdefault(path, []).append((row["step"], value))
    for path, line in found.items():
        listed = metric_of(path)
        name, title = "/".join(path), words(path)
        if listed is None:
            metric = Metric(name, title, "", "", group="learning")
        elif "*" in listed.name:  # several curves of one metric
            metric = Metric(
                name, title, listed.unit, listed.help, listed.better, listed.group, listed.detail
            )
        else:
            metric = listed
        yield MetricCurve(metric, {"": Line(line)}, NO_POLICY)


# charts of a group that are there beside those


def outcome_charts(run: RunData) -> str:
    """Reward in training; held-out accuracy, and that on validation tasks, if it was measured more
    than once."""
    mean = {"": Line(points(run.metrics, "reward"))}
    reward = chart(
        "reward", "training, 95 % interval over tasks", {"": banded(run.reward_points())}, NO_POLICY
    ) or chart("reward", "mean over the step's episodes", mean, NO_POLICY)
    measured = run.summary.get("measured", "accuracy")
    evaluated = [
        chart(f"{tasks} {measured}", "95 % interval", {"": banded(found)}, NO_POLICY)
        for tasks, labels in (("held-out", TEAM), ("validation", VALIDATION))
        if len(found := run.eval_points(labels)) > 1
    ]
    return "".join([reward, *evaluated])


def policy_legend(run: RunData) -> str:
    """The colours of the policies, where any has a curve."""
    return legend(colours(list(run.policies))) if any(policy_curves(run)) else ""


def cost_charts(run: RunData) -> str:
    """Where the seconds of a step went, and what learning had spent after it."""
    time = chart(
        "seconds of a step",
        "where the time went",
        time_split(run.metrics),
        TIME_COLOURS,
        own_legend=True,
    )
    return time + budget_curves(run)


def budget_curves(run: RunData) -> str:
    """What learning had spent after each step, of each thing that has a limit, or else of tokens;
    "" for a run that kept no ledger."""
    limits = (run.summary.get("budget") or {}).get("limit") or {}
    spent = [(row["step"], row.get("budget") or {}) for row in run.metrics]
    drawn = []
    for name in ("tokens", "calls", "cost"):
        line = [(s, float(b[name])) for s, b in spent if is_number(b.get(name))]
        limit = limits.get(name)
        if not line or not (limit or name == "tokens" or (name == "cost" and line[-1][1])):
            continue
        lines = {"spent": Line([(0, 0.0), *line])}
        if limit:
            lines["limit"] = Line([(0, float(limit)), (line[-1][0], float(limit))])
        drawn.append(
            chart(
                f"{name} spent",
                "on learning, running total",
                lines,
                {"spent": "c0", "limit": "c4"},
                own_legend=bool(limit),
            )
        )
    return "".join(drawn)


# points


def banded(points: Sequence[PointWithInterval]) -> Line:
    """A line of means with their intervals as a band."""
    return Line(
        [(step, mean) for step, mean, *_ in points],
        [(step, low, high) for step, _, low, high in points],
    )


def points(
    rows: Sequence[Mapping[str, Any]], key: str, policy: str = "", place: str = "policies"
) -> list[tuple[float, float]]:
    """(step, value) of every row of metrics.jsonl whose value is a number; of a policy, if one is
    named, in its entry below `place`."""
    line = []
    for row in rows:
        value = (((row.get(place) or {}).get(policy) or {}) if policy else row).get(key)
        if value is not None and is_number(value):
            line.append((row["step"], float(value)))
    return line


def numbers(
    row: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in a row, nested ones too, after the keys that lead to it."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, (*path, str(key)))
        elif is_number(value):
            yield (*path, str(key)), float(value)


def per_policy(run: RunData, key: str, place: str = "policies") -> dict[str, Line]:
    """One line for each policy."""
    return {name: Line(points(run.metrics, key, name, place)) for name in run.policies}


def time_split(rows: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Seconds of each part in each step, from the running totals."""
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in TIME_COLOURS}
    before: Mapping[str, float] = {}
    for row in rows:
        now = row.get("seconds") or {}
        for name, line in lines.items():
            if is_number(now.get(name)):
                line.append((row["step"], max(0.0, now[name] - before.get(name, 0.0))))
        before = now
    return {name: Line(line) for name, line in lines.items()}
