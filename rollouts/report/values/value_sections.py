"""Sections of the report on what a run learns beside weights: values over time, archives of
candidates, and what a method remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..charts import Line, chart
from ..html import number, section, table, text
from ..run_data import RunData
from ..tables import any_value
from .archive import (
    Archive,
    ArchivedCandidate,
    archive_of,
    candidate_details,
    origin_of,
    parts_of,
    reasons,
    shown_of,
)
from .history import ValueHistory, as_logits, as_text, is_choice, is_numeric, trials_of
from .logits import logits_over_steps
from .score_table import score_table_of, score_table_section
from .supernet import as_weights, supernet_section, weights_over_steps
from .texts import text_diff, whole_text
from .tree import tree

MAX_CHANGES = 20  # of a value that are shown
MAX_UNFOLDED = 3  # texts whose changes are not folded


def value_sections(run: RunData, n: int) -> list[str]:
    """Sections of run number `n`, "" for each that has nothing to show. Raises `StoreError` for a
    state in the store that was altered."""
    history, parts, trials = ValueHistory.read(run), parts_of(run.folder), trials_of(run)
    archives = {
        name: archive for name, state in parts.items() if (archive := archive_of(state)) is not None
    }
    tables = {
        name: found for name, state in parts.items() if (found := score_table_of(state)) is not None
    }
    remembered = {
        name: state
        for name, state in parts.items()
        if state and name not in {*archives, *tables} and name not in history.names
    }
    first = next(iter(archives), "")
    return [
        section(
            "Values <small>over steps</small>",
            values_over_time(history, list(archives.values())),
            "values",
            f"values-{n}",
        ),
        *(
            section(
                f"Candidates <small>{text(name)}</small>",
                candidates(archive, f"c{n}-{number}", trials),
                "candidates",
                f"candidates-{n}" if name == first else "",
            )
            for number, (name, archive) in enumerate(archives.items())
        ),
        *(
            section(
                f"Score table <small>{text(name)}</small>",
                score_table_section(each),
                "scores",
                f"scores-{n}-{number}",
            )
            for number, (name, each) in enumerate(tables.items())
        ),
        section(
            "Supernet <small>by kind of query</small>",
            supernet_section(run.summary.get("supernet")),
            "values",
        ),
        section(
            "What the method remembers",
            "".join(_memory(name, state) for name, state in remembered.items()),
        ),
    ]


def _memory(name: str, state: Any) -> str:
    body = "".join(
        f"<h4>{text(key)}</h4>{any_value(value)}" for key, value in state.items() if value != []
    )
    return f"<details><summary>{text(name)}</summary>{body}</details>"


# values over time


def values_over_time(history: ValueHistory, archives: Sequence[Archive]) -> str:
    """What became of every value: choices as a table, numbers and logits as curves, texts as
    diffs; "" where none was ever set or no step is done."""
    if len(history.points) < 2 or not history.names:
        return ""
    moved = [name for name in history.names if len(history.changes(name)) > 1]
    kinds: dict[str, list[str]] = {"choice": [], "number": [], "logits": []}
    kinds |= {"weights": [], "text": []}
    for name in moved:
        kinds[_kind(name, [value for _, value in history.of(name)])].append(name)
    shown = [
        _choices(history, kinds["choice"]),
        _numbers(history, kinds["number"]),
        *(_logits(history, name) for name in kinds["logits"]),
        *(weights_over_steps(name, history.of(name)) for name in kinds["weights"]),
        *(
            _text_changes(history, name, archives, len(kinds["text"]) <= MAX_UNFOLDED)
            for name in kinds["text"]
        ),
        _unmoved(history, [name for name in history.names if name not in moved]),
    ]
    return "".join(shown)


def _kind(name: str, values: Sequence[Any]) -> str:
    given = [value for value in values if value is not None]
    if given and all(as_logits(value) is not None for value in given):
        return "logits"
    if given and all(as_weights(value) is not None for value in given):
        return "weights"
    if is_numeric(given):
        return "number"
    return "choice" if is_choice(name, given) else "text"


def _choices(history: ValueHistory, names: Sequence[str]) -> str:
    """A row for the first point and for every step at which one of these values changed."""
    rows: list[list[str]] = []
    before: list[Any] = []
    for step, values in history.points:
        now = [values.get(name, history.defaults.get(name)) for name in names]
        if now != before:
            old = before or now
            cells = [_choice(a, a != b) for a, b in zip(now, old, strict=True)]
            rows.append([number(step), *cells])
        before = now
    if not names:
        return ""
    some = rows if len(rows) <= MAX_CHANGES else [rows[0], *rows[1 - MAX_CHANGES :]]
    note = f'<p class="soft">{len(rows) - len(some)} earlier changes are left out</p>'
    return table(("step", *map(text, names)), some) + note * (len(some) < len(rows))


def _choice(value: Any, changed: bool) -> str:
    return f"<b>{number(value)}</b>" if changed else number(value)


def _numbers(history: ValueHistory, names: Sequence[str]) -> str:
    charts = "".join(
        chart(
            name,
            "",
            {"": Line([(s, float(v)) for s, v in history.of(name) if v is not None])},
            {"": "c6"},
        )
        for name in names
    )
    return f'<div class="grid">{charts}</div>' if charts else ""


def _logits(history: ValueHistory, name: str) -> str:
    points = [(s, rows) for s, v in history.of(name) if (rows := as_logits(v)) is not None]
    return f"<h4>{text(name)}</h4>{logits_over_steps(name, points)}"


def _text_changes(
    history: ValueHistory, name: str, archives: Sequence[Archive], unfolded: bool
) -> str:
    """A text's changes as diffs, each with who proposed it, why, and what the gate said."""
    changes = history.changes(name)
    steps = [
        f"<h4>step {number(step)}</h4>{_why(origin_of(archives, name, value))}"
        f"{text_diff(as_text(old), as_text(value))}"
        for (_, old), (step, value) in zip(changes, changes[1:], strict=False)
    ]
    left_out = len(steps) - MAX_CHANGES
    note = f'<p class="soft">{left_out} earlier changes are left out</p>' if left_out > 0 else ""
    now = whole_text(as_text(changes[-1][1]))
    head = f"{len(steps)} change{'s' if len(steps) > 1 else ''}"
    return (
        f"<details{' open' * unfolded}><summary><b>{text(name)}</b> <small>{head}</small></summary>"
        f"{note}{''.join(steps[-MAX_CHANGES:])}"
        f"<details><summary>the whole text now</summary>{now}</details></details>"
    )


def _why(candidate: ArchivedCandidate | None) -> str:
    return "" if candidate is None else reasons(candidate)


def _unmoved(history: ValueHistory, names: Sequence[str]) -> str:
    if not names:
        return ""
    values = history.points[-1][1]
    rows = [(text(name), f"<code>{text(as_text(values.get(name)), 200)}</code>") for name in names]
    return (
        f"<details><summary>{len(names)} value{'s' if len(names) > 1 else ''} never changed"
        f"</summary>{table(('', ''), rows)}</details>"
    )


# archives


def candidates(
    archive: Archive, prefix: str, trials: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> str:
    """An archive as a tree, and its candidates to unfold below it. `prefix` begins their anchors,
    which are unique on the page; `trials`: how ids begin of those that had these values."""
    shown = shown_of(archive)
    numbers = {id: number for number, id in enumerate(shown)}

    def anchor(candidate: ArchivedCandidate) -> str:
        return f"{prefix}-{numbers[candidate.id]}"

    lost = sum(bool(c.fault) for c in archive.values())
    adopted = sum(bool(c.adopted) for c in archive.values())
    line = f"{len(archive)} candidates, {adopted} of them adopted, {lost} lost"
    if len(shown) < len(archive):
        line += f"; shown are {len(shown)}: those adopted, the best, and what they came from"
    key = (
        '<p class="legend"><span class="adopted">adopted</span>'
        '<span class="kept">not adopted</span><span class="lost">lost</span></p>'
    )
    entries = "".join(
        candidate_details(c, archive, anchor(c), _trials(c, trials)) for c in shown.values()
    )
    return f"<p>{line}</p>{key}{tree(shown, anchor)}<div>{entries}</div>"


def _trials(candidate: ArchivedCandidate, trials: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How the ids begin of the first trials with the candidate's values, "" if there are none."""
    own = candidate.values.items()
    return next(
        (begin for begin, had in trials if own and all(had.get(n) == v for n, v in own)), ""
    )
