"""What the report says of a run in words, tables and curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..evaluation.rounds import transition_rows
from .charts import Line, chart
from .episode_index import EpisodeRow
from .html import is_number, legend, number, section, table, text, whisker

if TYPE_CHECKING:
    from .report import RunData

MAX_PROOFS = 24
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
# what else of a row of metrics.jsonl has a place of its own: as a curve, or elsewhere on the page
PLACED = {"step", "reward", "episodes", "sampled_tokens", *(key for key, *_ in RUN_CURVES)}
ELSEWHERE = {"policies", "proof", "seconds", "dropped"}
SPLIT = {
    "rollout": "c3",
    "train": "c4",
    "publish": "c5",
}  # parts of a step's time and their colours


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def colours(names: Sequence[str]) -> dict[str, str]:
    return {name: f"c{number % 6}" for number, name in enumerate(names)}


# did it help?


def verdict(run: RunData, n: int) -> str:
    """The answer in a sentence, which adapter it comes from, and three episodes to read."""
    open_end = run.summary.get("unfinished")
    lines = (
        [
            '<p class="note">This run did not end, or has not yet: what follows is as far as it'
            " came.</p>"
        ]
        if open_end
        else []
    )
    found = run.summary.get("eval") or {}
    before, after, paired = (found.get(key) for key in ("before", "after", "paired"))
    if not (before and after and paired):
        return "".join(lines)
    low, high = paired["ci95"]
    what = (
        "Training helped"
        if low > 0
        else "Training hurt"
        if high < 0
        else "No effect of training is shown"
    )
    told = (
        f"{what}{' so far' if open_end else ''}: {before['accuracy']:.3f} → {after['accuracy']:.3f}"
    )
    told += f" on {after['num_tasks']} held-out tasks"
    lines.append(
        f'<p class="verdict {"good" if low > 0 else "bad" if high < 0 else ""}"><b>{told}</b>'
        f" {change(paired)}.</p>"
    )
    alone = []
    for name, entry in (run.summary.get("adapters") or {}).items():
        first, last = entry["paired"]["ci95"]
        does = "helps" if first > 0 else "hurts" if last < 0 else "shows no effect"
        alone.append(f"<b>{text(name)}</b> alone {does} {change(entry['paired'])}")
    lines += [f"<p>By adapter: {'; '.join(alone)}.</p>"] if alone else []
    links = " · ".join(
        f'<a href="#e={n}:{quote(row.id)}">{what}</a>' for what, row in examples(run.episodes)
    )
    return "".join(lines) + (f"<p>Read: {links}</p>" if links else "")


def change(paired: Mapping[str, Any]) -> str:
    low, high = paired["ci95"]
    counts = (
        f", {paired['gained']} tasks gained, {paired['lost']} lost" if "gained" in paired else ""
    )
    return f"({paired['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}{counts})"


def examples(rows: Sequence[EpisodeRow]) -> list[tuple[str, EpisodeRow]]:
    """An episode that training mended, one that it broke, one that is still wrong: of the last
    evaluation of the whole team."""
    labels = list(dict.fromkeys(r.label for r in rows if r.evaluates_team))
    if len(labels) < 2:
        return []
    before = {r.task: r.worth or 0.0 for r in rows if r.label == labels[0]}
    after = [
        (r, (r.worth or 0.0) - before[r.task])
        for r in rows
        if r.label == labels[-1] and r.task in before
    ]
    best = max((w.worth or 0.0 for w, _ in after), default=0.0)
    kinds = (
        ("an episode that training mended", [r for r, d in after if d > 0]),
        ("one that it broke", [r for r, d in after if d < 0]),
        ("one that still fails", [r for r, d in after if d == 0 and (r.worth or 0.0) < best]),
    )
    return [(what, found[0]) for what, found in kinds if found]


def facts(run: RunData) -> str:
    summary, config = run.summary, run.config
    seconds, tokens = summary.get("seconds") or {}, summary.get("tokens") or {}
    steps = (
        f"{len(run.metrics)} of {config.get('max_steps', '?')}"
        if summary.get("unfinished")
        else number(summary.get("steps"))
    )
    parts = ", ".join(
        f"{name} {number(round(s))}" for name, s in seconds.items() if name != "total" and s
    )
    system = str((config.get("system") or {}).get("class", "")).rpartition(":")[2]
    credit = str(config.get("credit", ""))
    items = (
        ("model", text(config.get("model", ""))),
        ("system", text(system)),
        ("tasks", text(config.get("tasks", ""))),
        ("engine", text(summary.get("engine") or config.get("engine", ""))),
        ("steps", steps),
        ("credit", text(credit)),
        (
            "seconds",
            (
                f"{number(round(seconds.get('total', 0)))} ({text(parts)})"
                if seconds.get("total")
                else text(parts)
            ),
        ),
        ("tokens", ", ".join(f"{number(count)} {text(name)}" for name, count in tokens.items())),
    )
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in items if value)}</dl>"


def accuracies(summary: Mapping[str, Any]) -> str:
    found = summary.get("eval") or {}
    rows = {
        "base team": found.get("before"),
        **{f"only {n}": e for n, e in (summary.get("adapters") or {}).items()},
    }
    rows["trained team"] = (
        {**found["after"], "paired": found.get("paired")} if found.get("after") else None
    )
    body = [accuracy_row(name, entry) for name, entry in rows.items() if entry]
    return (
        table(("", "mean, 95 % interval", "0 to 1", "tasks", "against base, paired"), body)
        if body
        else ""
    )


def accuracy_row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = entry["ci95"]
    paired = entry.get("paired") or {}
    ahead = (
        f"{paired['difference']:+.3f} <small>[{paired['ci95'][0]:+.3f},"
        f" {paired['ci95'][1]:+.3f}]</small>"
        if paired
        else ""
    )
    mean = f"{entry['accuracy']:.3f} <small>[{low:.3f}, {high:.3f}]</small>"
    drawn = whisker(entry["accuracy"], low, high) if low >= 0 and high <= 1 else ""
    return (text(name), mean, drawn, number(entry["num_tasks"]), ahead)


# curves


def curves(run: RunData, n: int) -> list[str]:
    """Accuracy as a table, then everything over steps: what has a name here first, then whatever
    else the run wrote."""
    colour = colours(list(run.policies))
    rewards, evals = run.reward_points(), run.eval_points()
    drawn = [
        chart("reward", "training, 95 % interval over tasks", {"": banded(rewards)}, {"": "c6"})
        or chart(
            "reward",
            "mean over the step's episodes",
            {"": Line(points(run.metrics, "reward"))},
            {"": "c6"},
        ),
        (
            chart("held-out accuracy", "95 % interval", {"": banded(evals)}, {"": "c6"})
            if len(evals) > 1
            else ""
        ),
    ]
    known = [key for key, *_ in POLICY_CURVES]
    every = dict.fromkeys(
        k for row in run.metrics for own in (row.get("policies") or {}).values() for k in own
    )
    drawn += [
        chart(title, note, per_policy(run, key), colour)
        for key, title, note in POLICY_CURVES
        if key in every
    ]
    drawn.append(
        chart(
            "proof residual", "served against trained", per_policy(run, "residual", "proof"), colour
        )
    )
    drawn += [
        chart(title, note, {"": Line(points(run.metrics, key))}, {"": "c6"})
        for key, title, note in RUN_CURVES
    ]
    drawn.append(
        chart(
            "seconds of a step",
            "where the time went",
            time_split(run.metrics),
            SPLIT,
            own_legend=True,
        )
    )
    rest = [
        chart(key.replace("_", " "), "", per_policy(run, key), colour)
        for key in every
        if key not in known
    ]
    others: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:  # what critics say stands with their policies
        for title, value in numbers(
            {k: v for k, v in row.items() if k not in PLACED | ELSEWHERE | {"critics"}}
        ):
            others.setdefault(title, []).append((row["step"], value))
    rest += [chart(title, "", {"": Line(found)}, {"": "c6"}) for title, found in others.items()]
    shown, hidden = "".join(drawn), "".join(rest)
    folded = (
        '<details class="wide"><summary>More curves</summary><div'
        f' class="grid">{hidden}</div></details>'
        if hidden
        else ""
    )
    return [
        section("Held-out accuracy", accuracies(run.summary), name=f"accuracy-{n}"),
        section(
            "Curves <small>by step</small>",
            legend(colour) + shown + folded if shown else "",
            "grid",
            f"curves-{n}",
        ),
    ]


def banded(found: Sequence[tuple[int, float, float, float]]) -> Line:
    return Line(
        [(step, mean) for step, mean, *_ in found],
        [(step, low, high) for step, _, low, high in found],
    )


def points(
    rows: Sequence[Mapping[str, Any]], key: str, policy: str = "", place: str = "policies"
) -> list[tuple[float, float]]:
    """(step, value) wherever the value is a number."""
    found = []
    for row in rows:
        value = (((row.get(place) or {}).get(policy) or {}) if policy else row).get(key)
        if value is not None and is_number(value):
            found.append((row["step"], float(value)))
    return found


def numbers(row: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a row, and the words that lead to it."""
    for key, value in row.items():
        title = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from numbers(value, title)
        elif is_number(value):
            yield title, float(value)


def last_step(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a method told of the last step, a table each: turns kept and dropped, margins by agent,
    rounds."""
    if not rows:
        return []
    told = {
        key: value
        for key, value in rows[-1].items()
        if isinstance(value, Mapping) and key not in ELSEWHERE
    }
    return [
        section(text(f"{key.replace('_', ' ')}, step {rows[-1]['step']}"), more(value))
        for key, value in told.items()
    ]


def per_policy(run: RunData, key: str, place: str = "policies") -> dict[str, Line]:
    return {name: Line(points(run.metrics, key, name, place)) for name in run.policies}


def time_split(rows: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Seconds of each part in each step, from the running totals."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SPLIT}
    before: Mapping[str, float] = {}
    for row in rows:
        now = row.get("seconds") or {}
        for name in SPLIT:
            if is_number(now.get(name)):
                found[name].append((row["step"], max(0.0, now[name] - before.get(name, 0.0))))
        before = now
    return {name: Line(line) for name, line in found.items()}


# several runs


def comparison(runs: Sequence[RunData]) -> str:
    """A row for each run and their curves in one chart."""
    rows, colour = [], colours([run.name for run in runs])
    for number_, run in enumerate(runs):
        found = run.summary.get("eval") or {}
        cells = [
            (
                f"{e['accuracy']:.3f} <small>[{e['ci95'][0]:.3f}, {e['ci95'][1]:.3f}]</small>"
                if e
                else "–"
            )
            for e in (found.get("before"), found.get("after"))
        ]
        paired = found.get("paired")
        cells.append(
            f"{paired['difference']:+.3f} <small>[{paired['ci95'][0]:+.3f},"
            f" {paired['ci95'][1]:+.3f}]</small>"
            if paired
            else "–"
        )
        cells += [
            number(run.summary.get("steps")),
            number((run.summary.get("tokens") or {}).get("sampled")),
        ]
        cells += [number(round((run.summary.get("seconds") or {}).get("total", 0)))]
        rows.append(
            (
                f'<a class="{colour[run.name]}" href="#run-{number_}">{text(run.name)}</a>',
                text(run.title),
                *cells,
            )
        )
    head = (
        "run",
        "recipe",
        "before",
        "after",
        "paired difference",
        "steps",
        "tokens sampled",
        "seconds",
    )
    drawn = legend(colour)
    drawn += chart(
        "held-out accuracy",
        "95 % interval",
        {run.name: banded(run.eval_points()) for run in runs},
        colour,
    )
    drawn += chart(
        "reward",
        "training, 95 % interval",
        {run.name: banded(run.reward_points()) for run in runs},
        colour,
    )
    keys = dict.fromkeys(
        k
        for run in runs
        for k in run.config
        if any(k not in r.config or r.config[k] != run.config[k] for r in runs)
    )
    different = [
        (f"<code>{text(key)}</code>", *(text(run.config.get(key, "–"), 120) for run in runs))
        for key in keys
    ]
    settings = table(("setting", *(text(run.name) for run in runs)), different) if different else ""
    return section(
        "Runs compared",
        table(head, rows)
        + f'<div class="grid top">{drawn}</div>'
        + (
            f"<details><summary>{len(different)} settings differ</summary>{settings}</details>"
            if different
            else ""
        ),
        name="compare",
    )


# adapters, proof, the rest


def adapters(policies: Mapping[str, Mapping[str, Any]], kind: str = "policy") -> str:
    colour = colours(list(policies))
    rows = [
        (
            f'<span class="{colour[name]}">{text(name)}</span>',
            number(entry.get("trainable_parameters")),
            *(
                f"<code>{text(str(entry.get(key) or '')[:16])}</code>"
                for key in ("sha256_before", "sha256_after")
            ),
            (
                ""
                if "sha256_before" not in entry
                else "unchanged"
                if entry["sha256_before"] == entry["sha256_after"]
                else "trained"
            ),
        )
        for name, entry in policies.items()
    ]
    return (
        table((kind, "trainable parameters", "sha256 before", "sha256 after", ""), rows)
        if rows
        else ""
    )


def proofs(counts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """All that failed, and the latest of the others."""
    if not records:
        return ""
    shown = [r for r in records if r["status"] == "failed"] + [
        r for r in records if r["status"] != "failed"
    ][-MAX_PROOFS:]
    numbers = [
        name
        for name in records[0]
        if any(is_number(r.get(name)) for r in records) and name != "step"
    ]
    rows = [
        (
            number(r["step"]),
            text(r["version"]),
            text(r["replica"]),
            status(r),
            *(number(r.get(name)) for name in numbers),
        )
        for r in sorted(shown, key=lambda r: r["step"])
    ]
    line = ", ".join(
        f"{number(value)} {text(name.replace('_', ' '))}"
        for name, value in counts.items()
        if name != "max_residual"
    )
    line += (
        f"; largest residual {number(counts['max_residual'])}" if "max_residual" in counts else ""
    )
    head = (
        "step",
        "version",
        "replica",
        "status",
        *(text(name.replace("_", " ")) for name in numbers),
    )
    more = (
        f" ({len(rows)} of {len(records)}; all of them: proofs.json)"
        if len(rows) < len(records)
        else ""
    )
    return f"<p>{line}</p><details><summary>Records{more}</summary>{table(head, rows)}</details>"


def status(record: Mapping[str, Any]) -> str:
    name = text(record["status"])
    return f'<span class="{name}">{name}</span> {text(record["reason"])}'


def rounds(found: Mapping[str, Any] | None) -> str:
    """What the rounds of debates did to answers (`transitions.py`)."""
    if not found:
        return ""
    head, rows = transition_rows(found)
    return table(list(map(text, head)), [list(map(text, row)) for row in rows])


def more(value: Any) -> str:
    """Whatever a method put into `summary.json`: numbers as a list, rows and mappings of numbers as
    a table, the rest as JSON."""
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        heads = list(dict.fromkeys(k for v in value.values() for k in v))
        return table(
            ("", *map(text, heads)),
            [(text(n), *(cell(v.get(k)) for k in heads)) for n, v in value.items()],
        )
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        heads = list(dict.fromkeys(k for v in value for k in v))
        return table(list(map(text, heads)), [[cell(v.get(k)) for k in heads] for v in value])
    if isinstance(value, Mapping) and value:
        return table(("", ""), [(text(k.replace("_", " ")), cell(v)) for k, v in value.items()])
    return "" if value in (None, {}, []) else f"<p>{cell(value)}</p>"


def cell(value: Any) -> str:
    """Numbers of a list or mapping stand in a line; what is nested deeper is JSON."""
    inside = (
        list(value.values() if isinstance(value, Mapping) else value)
        if isinstance(value, (Mapping, list))
        else None
    )
    if inside is None or any(isinstance(each, (Mapping, list)) for each in inside):
        return number(value) if inside is None else f"<code>{text(json.dumps(value), 400)}</code>"
    if isinstance(value, Mapping):
        return " · ".join(f"{text(key)} <b>{number(each)}</b>" for key, each in value.items())
    return ", ".join(map(number, inside))


def warnings(run: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the run warned of, and what its rows show should be looked at."""
    path = run / "warnings.log"
    found = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for key, what in (
        ("failed", "episodes failed"),
        ("unscorable", "episodes could not be scored"),
    ):
        if count := sum(row.get(key) or 0 for row in rows):
            found.append(f"{count} of {sum(row.get('episodes') or 0 for row in rows)} {what}")
    dropped: dict[str, int] = {}
    for row in rows:
        for reason, count in (row.get("dropped") or {}).items():
            dropped[reason] = dropped.get(reason, 0) + count
    found += [f"{count} turns not trained on, {reason}" for reason, count in dropped.items()]
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in found)}</ul>" if found else ""
