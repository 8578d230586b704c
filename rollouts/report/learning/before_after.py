"""What training changed on single tasks: one task's episode before and after side by side, and how
each kind of task moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ...evaluation.statistics import Evaluation, paired
from ..episode_index import EpisodeIndex, EpisodeRow
from ..html import number, table, text
from ..run_data import TEAM, RunData
from ..tables import colours, difference_with_interval

SAID = 1200  # characters of a reply that are shown
FEWEST, MOST = 2, 12  # values of a field of tasks that make kinds of it
MOVED = 8  # kinds of task that are not folded
HEAD = ("field", "kind of task", "tasks", "before", "after", "difference", "gained", "lost")


@dataclass(frozen=True)
class Change:
    """A task that was evaluated before and after training, with one episode of each. `what` it is
    an example of."""

    what: str
    before: EpisodeRow
    after: EpisodeRow

    @property
    def gain(self) -> float:
        return (self.after.worth or 0.0) - (self.before.worth or 0.0)


def changes(run: RunData) -> list[Change]:
    """The tasks of the last evaluation of the whole team that were evaluated before too, each with
    its first episode."""
    made = [label for label in run.evaluations if TEAM.fullmatch(label) and label != "before"]
    if not made:
        return []
    before, after = (_first_of(run, label) for label in ("before", made[-1]))
    return [Change("", before[task], after[task]) for task in after if task in before]


def _first_of(run: RunData, label: str) -> dict[str, EpisodeRow]:
    """By task, the first episode of an evaluation."""
    found: dict[str, EpisodeRow] = {}
    for row in run.episodes:
        if row.kind == "eval" and not row.child and label in row.evaluations:
            found.setdefault(row.task, row)
    return found


def examples(run: RunData) -> list[Change]:
    """Up to three: a task that training corrected, one that it broke, one that still fails."""
    moved = changes(run)
    best = max((change.after.worth or 0.0 for change in moved), default=0.0)
    kinds = (
        ("training corrected", [c for c in moved if c.gain > 0]),
        ("training broke", [c for c in moved if c.gain < 0]),
        ("still fails", [c for c in moved if c.gain == 0 and (c.after.worth or 0.0) < best]),
    )
    return [Change(what, own[0].before, own[0].after) for what, own in kinds if own]


def ids_to_show(run: RunData) -> set[str]:
    """Ids of the episodes that `side_by_side` shows, which the page has to hold whole."""
    return {row.id for change in examples(run) for row in (change.before, change.after)}


# side by side


def side_by_side(run: RunData, n: int, index: EpisodeIndex) -> str:
    """Examples of what changed, the first one unfolded; "" where the team was not evaluated twice
    on a task. `index` holds the episodes' texts, of run number `n`."""
    strings = list(index.strings)
    folds: list[str] = []
    for change in examples(run):
        names = [f"{n}:{row.id}" for row in (change.before, change.after)]
        sides = [index.episodes[name] for name in names if name in index.episodes]
        if len(sides) == len(names):
            folds.append(_fold(change, n, sides, strings, unfolded=not folds))
    return "".join(folds)


def _fold(
    change: Change,
    n: int,
    sides: Sequence[Mapping[str, Any]],
    strings: Sequence[str],
    *,
    unfolded: bool,
) -> str:
    first = sides[0]
    colour = colours(list(dict.fromkeys(strings[t["agent"]] for s in sides for t in s["turns"])))
    heads = [
        f"<h4>{name} <small>{_worth(row)} · "
        f'<a href="#e={n}:{quote(row.id)}">the whole episode</a></small></h4>'
        for name, row in (("before", change.before), ("after", change.after))
    ]
    columns = "".join(
        f'<div class="side">{head}{_side(side, strings, colour)}</div>'
        for head, side in zip(heads, sides, strict=True)
    )
    answer = "" if first["answer"] is None else _field("expected", strings[first["answer"]])
    return (
        f"<details{' open' * unfolded}><summary>A task that <b>{change.what}</b>:"
        f" {text(change.after.prompt)}</summary>{_field('task', strings[first['prompt']])}{answer}"
        f'<div class="sides">{columns}</div></details>'
    )


def _worth(row: EpisodeRow) -> str:
    return "unscorable" if row.worth is None else f"reward {number(row.worth)}"


def _side(episode: Mapping[str, Any], strings: Sequence[str], colour: Mapping[str, str]) -> str:
    """What each agent said, then what came out."""
    turns = [t for t in episode["turns"] if "not taken" not in t.get("marks", ())]
    said = "".join(
        f'<p class="who"><span class="{colour[strings[t["agent"]]]}">'
        f"{text(strings[t['agent']])}</span></p><pre>{text(strings[t['text']], SAID)}</pre>"
        for t in turns
    )
    error, output = episode["error"], episode["output"]
    repeated = bool(turns) and turns[-1]["text"] == output
    ended = _field("error", strings[error]) if error is not None else ""
    shown = output is not None and not repeated
    return said + ended + (_field("output", strings[output]) if shown else "")


def _field(name: str, said: str) -> str:
    return f"<h4>{name}</h4><pre>{text(said, SAID)}</pre>"


# kinds of task


@dataclass(frozen=True)
class Kind:
    """Tasks that share a value of a field, and how they moved together."""

    name: str
    value: str
    tasks: Sequence[Change]

    @property
    def gain(self) -> float:
        return sum(change.gain for change in self.tasks) / len(self.tasks)

    def row(self) -> tuple[str, ...]:
        """Field, value, number of tasks, accuracy before and after, difference, gained, lost."""
        before, after = (
            Evaluation({row.task: row.worth or 0.0 for row in rows})
            for rows in ([c.before for c in self.tasks], [c.after for c in self.tasks])
        )
        difference = paired(before, after)
        return (
            text(self.name),
            text(self.value),
            number(len(self.tasks)),
            f"{before.accuracy:.3f}",
            f"{after.accuracy:.3f}",
            difference_with_interval(difference),
            number(difference["gained"]),
            number(difference["lost"]),
        )


def kinds_table(run: RunData) -> str:
    """How each kind of task moved, those first that moved most: a row for every value of their
    source and of the fields of their meta that few values are of; "" where all are of one kind."""
    moved = changes(run)
    kinds = [kind for name in _fields(moved) for kind in _kinds(moved, name)]
    rows = [kind.row() for kind in sorted(kinds, key=lambda kind: -abs(kind.gain))]
    if not rows:
        return ""
    moved_most = min(MOVED, sum(bool(kind.gain) for kind in kinds))
    shown, more = rows[:moved_most], rows[moved_most:]
    folded = f"<details><summary>{len(more)} more kinds</summary>{table(HEAD, more)}</details>"
    return (table(HEAD, shown) if shown else "<p>None moved.</p>") + folded * bool(more)


def _fields(moved: Sequence[Change]) -> Iterator[str]:
    """Names of fields that split the tasks into kinds."""
    for name in dict.fromkeys(name for change in moved for name in change.after.kinds):
        values = {change.after.kinds.get(name, "") for change in moved}
        if FEWEST <= len(values) <= MOST:
            yield name


def _kinds(moved: Sequence[Change], name: str) -> Iterator[Kind]:
    """The tasks by their value of a field."""
    kinds: dict[str, list[Change]] = {}
    for change in moved:
        kinds.setdefault(change.after.kinds.get(name, ""), []).append(change)
    yield from (Kind(name, value, own) for value, own in kinds.items())
