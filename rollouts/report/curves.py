"""Curves of the report: what a run's metrics and episodes say over its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .charts import Line, chart
from .html import is_number, legend, section
from .run_data import TEAM, VALIDATION, PointWithInterval, RunData
from .tables import METRIC_KEYS_ELSEWHERE, accuracy_table, colours

# key of a policy's row in metrics.jsonl, title, what it means; a key that is not here is drawn
# under its own name
POLICY_CURVES = (
    ("loss", "loss", "last pass"),
    ("mismatch_kl", "KL", "from the engine's policy after the step"),
    ("first_mismatch_kl", "mismatch KL", "trainer to server, before a step"),
    ("entropy", "entropy", "nat per trained token"),
    ("clipped", "clipped share", "of trained tokens"),
    ("grad_norm", "gradient norm", "before clipping"),
    ("ratio_outside", "ratios off by 0.1", "share of trained tokens"),
    ("constant_groups", "silent groups", "share that taught nothing"),
    ("truncated", "cut-off replies", "share at the token limit"),
    ("tokens", "trained tokens", "in the step"),
    ("learning_rate", "learning rate", ""),
)
RUN_CURVES = (
    ("tokens_per_s", "tokens per second", "sampled, while playing"),
    ("staleness", "staleness", "versions behind"),
)
# keys of a row of metrics.jsonl that no curve "of another name" is drawn for
PLACED = {"step", "reward", "reward_min", "reward_max", "episodes", "sampled_tokens"}
PLACED |= {key for key, *_ in RUN_CURVES}
TIME_COLOURS = {"rollout": "c3", "train": "c4", "publish": "c5"}  # parts of a step's time
NO_POLICY = {"": "c6"}  # colour of a curve of the whole run


def curves(run: RunData, n: int) -> list[str]:
    """Sections of run number `n`: accuracy as a table; everything over steps, what has a name here
    first, then whatever else the run wrote."""
    colour = colours(list(run.policies))
    keys = list(
        dict.fromkeys(
            k for row in run.metrics for own in (row.get("policies") or {}).values() for k in own
        )
    )
    shown = "".join(_outcome_curves(run) + _named_curves(run, keys, colour))
    more = "".join(_other_curves(run, keys, colour))
    folded = (
        '<details class="wide"><summary>More curves</summary><div'
        f' class="grid">{more}</div></details>'
        if more
        else ""
    )
    return [
        section("Held-out accuracy", accuracy_table(run.summary), name=f"accuracy-{n}"),
        section(
            "Curves <small>by step</small>",
            legend(colour) + shown + folded if shown else "",
            "grid",
            f"curves-{n}",
        ),
    ]


def _outcome_curves(run: RunData) -> list[str]:
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
    return [reward, *evaluated]


def _named_curves(run: RunData, keys: Sequence[str], colour: Mapping[str, str]) -> list[str]:
    """Curves with a title of their own: of policies, of the live proof, of the run, of time."""
    drawn = [
        chart(title, note, per_policy(run, key), colour)
        for key, title, note in POLICY_CURVES
        if key in keys
    ]
    residuals = per_policy(run, "residual", "proof")
    drawn.append(chart("proof residual", "served against trained", residuals, colour))
    drawn += [
        chart(title, note, {"": Line(points(run.metrics, key))}, NO_POLICY)
        for key, title, note in RUN_CURVES
    ]
    drawn.append(
        chart(
            "seconds of a step",
            "where the time went",
            time_split(run.metrics),
            TIME_COLOURS,
            own_legend=True,
        )
    )
    return drawn


def _other_curves(run: RunData, keys: Sequence[str], colour: Mapping[str, str]) -> list[str]:
    """Curves under the names that the metrics have: first those of policies, then the run's."""
    named = {key for key, *_ in POLICY_CURVES}
    drawn = [
        chart(key.replace("_", " "), "", per_policy(run, key), colour)
        for key in keys
        if key not in named
    ]
    # what critics say stands with their policies
    placed = PLACED | METRIC_KEYS_ELSEWHERE | {"critics"}
    others: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:
        for title, value in numbers({k: v for k, v in row.items() if k not in placed}):
            others.setdefault(title, []).append((row["step"], value))
    return drawn + [chart(title, "", {"": Line(line)}, NO_POLICY) for title, line in others.items()]


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


def numbers(row: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a row, nested ones too, after the words of the keys that lead to it."""
    for key, value in row.items():
        title = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from numbers(value, title)
        elif is_number(value):
            yield title, float(value)


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
