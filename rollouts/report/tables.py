"""Tables of the report: accuracies, adapters, live proof, warnings, and values of any shape."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .html import is_number, number, section, table, text, whisker
from .sections import ReportSection

MAX_PROOFS = 24
MAX_UNFOLDED = 6  # warnings that are not folded
# mappings in a row of metrics.jsonl that stand elsewhere on the page
METRIC_KEYS_ELSEWHERE = {"policies", "proof", "seconds", "dropped", "budget"}


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour class of the style sheet for each name."""
    return {name: f"c{number % 6}" for number, name in enumerate(names)}


# accuracy


def accuracy_table(summary: Mapping[str, Any]) -> str:
    """Accuracy of the base team, of each adapter alone and of the trained team."""
    result = summary.get("eval") or {}
    entries = {
        "base team": result.get("before"),
        **{f"only {name}": entry for name, entry in (summary.get("adapters") or {}).items()},
    }
    if result.get("after"):
        entries["trained team"] = {**result["after"], "paired": result.get("paired")}
    rows = [_accuracy_row(name, entry) for name, entry in entries.items() if entry]
    head = ("", "mean, 95 % interval", "0 to 1", "tasks", "against base, paired")
    return table(head, rows) if rows else ""


def _accuracy_row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = entry["ci95"]
    paired = entry.get("paired")
    return (
        text(name),
        accuracy_with_interval(entry),
        whisker(entry["accuracy"], low, high) if low >= 0 and high <= 1 else "",
        number(entry["num_tasks"]),
        difference_with_interval(paired) if paired else "",
    )


def accuracy_with_interval(entry: Mapping[str, Any]) -> str:
    """`accuracy` of an evaluation's summary with its 95 % interval."""
    low, high = entry["ci95"]
    return f"{entry['accuracy']:.3f} <small>[{low:.3f}, {high:.3f}]</small>"


def difference_with_interval(paired: Mapping[str, Any]) -> str:
    """`difference` of a paired comparison with its 95 % interval."""
    low, high = paired["ci95"]
    return f"{paired['difference']:+.3f} <small>[{low:+.3f}, {high:+.3f}]</small>"


# adapters and live proof


def adapters(policies: Mapping[str, Mapping[str, Any]], kind: str = "policy") -> str:
    """Size of each policy's adapter, and its hash before and after training; "" where none has
    trainable parameters."""
    if policies and all(entry.get("trainable_parameters") == 0 for entry in policies.values()):
        return ""
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
    head = (kind, "trainable parameters", "sha256 before", "sha256 after", "")
    return table(head, rows) if rows else ""


def proofs(counts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Counts of the live proof; its records, all that failed and the latest of the others. A line
    without a table where nothing was trained, so that there was nothing to prove."""
    if not records:
        return ""
    if all(record["status"] == "identity" for record in records):
        served = len({record["version"] for record in records})
        return (
            f"<p>Nothing was trained, so there was nothing to prove. {served} frozen adapters were"
            " served from their folders, with the tensors of the run (compared by hash).</p>"
        )
    passed = [r for r in records if r["status"] != "failed"]
    shown = [r for r in records if r["status"] == "failed"] + passed[-MAX_PROOFS:]
    columns = [
        name
        for name in records[0]
        if any(is_number(r.get(name)) for r in records) and name != "step"
    ]
    rows = [
        (
            number(r["step"]),
            text(r["version"]),
            text(r["replica"]),
            _status(r),
            *(number(r.get(name)) for name in columns),
        )
        for r in sorted(shown, key=lambda r: r["step"])
    ]
    line = ", ".join(
        f"{number(value)} {_words(name)}"
        for name, value in counts.items()
        if name != "max_residual"
    )
    if "max_residual" in counts:
        line += f"; largest residual {number(counts['max_residual'])}"
    head = ("step", "version", "replica", "status", *map(_words, columns))
    some = len(rows) < len(records)
    note = f" ({len(rows)} of {len(records)}; all of them: proofs.json)" if some else ""
    return f"<p>{line}</p><details><summary>Records{note}</summary>{table(head, rows)}</details>"


def _status(record: Mapping[str, Any]) -> str:
    name = text(record["status"])
    return f'<span class="{name}">{name}</span> {text(record["reason"])}'


# what methods add


def section_body(content: ReportSection) -> str:
    """The table and the paragraph of a section, such as one that a training method added to the
    run's result."""
    rows = [list(map(text, row)) for row in content.rows]
    body = table(list(map(text, content.columns)), rows) if content.columns else ""
    return body + (f"<p>{text(content.text)}</p>" * bool(content.text))


def last_step(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each mapping in the last row of metrics.jsonl, such as turns dropped and margins
    by agent."""
    if not rows:
        return []
    return [
        section(f"{_words(key)}, step {text(rows[-1]['step'])}", any_value(value))
        for key, value in rows[-1].items()
        if isinstance(value, Mapping) and key not in METRIC_KEYS_ELSEWHERE
    ]


def any_value(value: Any) -> str:
    """A value of any shape: numbers as a list, rows and mappings of numbers as a table, without the
    rows that hold nothing, the rest as JSON."""
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        heads = list(dict.fromkeys(k for v in value.values() for k in v))
        return table(
            ("", *map(text, heads)),
            [(text(n), *(_cell(v.get(k)) for k in heads)) for n, v in value.items()],
        )
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        heads = list(dict.fromkeys(k for v in value for k in v))
        return table(list(map(text, heads)), [[_cell(v.get(k)) for k in heads] for v in value])
    if isinstance(value, Mapping) and value:
        said = [(_words(k), _cell(v)) for k, v in value.items() if v not in (None, "", [], {})]
        return table(("", ""), said) if said else ""
    return "" if value in (None, {}, []) else f"<p>{_cell(value)}</p>"


def _cell(value: Any) -> str:
    """Numbers of a list or mapping stand in a line; what is nested deeper is JSON."""
    inside = (
        list(value.values() if isinstance(value, Mapping) else value)
        if isinstance(value, (Mapping, list))
        else None
    )
    if inside is None:
        return number(value)
    if any(isinstance(each, (Mapping, list)) for each in inside):
        return f"<code>{text(json.dumps(value), 400)}</code>"
    if isinstance(value, Mapping):
        return " · ".join(f"{text(key)} <b>{number(each)}</b>" for key, each in value.items())
    return ", ".join(map(number, inside))


def _words(key: str) -> str:
    return text(key.replace("_", " "))


# warnings

STEP = re.compile(r"step (\d+): ")
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


def warning_lines(run: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong: lines of warnings.log, those that differ by numbers only as one; and from
    the metrics the episodes that failed or could not be scored, and the turns that were not trained
    on."""
    path = run / "warnings.log"
    kept = path.read_text(errors="replace", encoding="utf-8").splitlines() if path.is_file() else []
    return [*joined(kept), *_of_metrics(rows)]


def warnings(run: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A box of what went wrong (`warning_lines`); "" if nothing did."""
    lines = warning_lines(run, rows)
    if not lines:
        return ""
    head = f"{len(lines)} warning{'s' * (len(lines) > 1)}"
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    unfolded = " open" * (len(lines) <= MAX_UNFOLDED)
    return (
        f'<details class="warnings"{unfolded}><summary>{head}</summary><ul>{items}</ul></details>'
    )


def joined(lines: Sequence[str]) -> list[str]:
    """Warnings, of those that differ by numbers only the last one, with the steps it came in."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(NUMBER.sub("0", line), []).append(line)
    return [_once(several) for several in alike.values()]


def _once(several: Sequence[str]) -> str:
    if len(several) == 1:
        return several[0]
    steps = [int(match[1]) for line in several if (match := STEP.match(line))]
    when = f", steps {min(steps)} to {max(steps)}" if len(steps) == len(several) else ""
    return f"{STEP.sub('', several[-1], count=1)} ({len(several)} times{when})"


def _of_metrics(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for key, what in (
        ("failed", "episodes failed"),
        ("unscorable", "episodes could not be scored"),
    ):
        if count := sum(row.get(key) or 0 for row in rows):
            yield f"{count} of {sum(row.get('episodes') or 0 for row in rows)} {what}"
    dropped: Counter[str] = Counter()
    for row in rows:
        dropped.update(row.get("dropped") or {})
    yield from (f"{count} turns not trained on, {reason}" for reason, count in dropped.items())
