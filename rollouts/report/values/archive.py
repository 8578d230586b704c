"""Archives of candidates: what a search has tried, as its part in the newest checkpoint holds it,
with who proposed each candidate, why, and what the gate said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..html import number, text
from ..run_data import read_json
from .history import as_logits, as_text, newest_checkpoint
from .texts import text_diff, whole_text

MAX_CANDIDATES = 200  # of an archive that are shown
MAX_VALUES = 8  # of a candidate that are shown one by one
MAX_TRIED = 20  # candidates made from another one that it lists


@dataclass(frozen=True)
class ArchivedCandidate:
    """A candidate of an archive: the fields of `trainers/values/search.py`."""

    id: str
    values: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    proposer: str = ""
    note: str = ""
    fault: str = ""
    round: int = 0
    scores: Mapping[str, float] | None = None
    adopted: int = 0
    verdict: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ArchivedCandidate:
        """The candidate that a part's state holds as JSON; keys that are not known are left out."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, "parents": tuple(data.get("parents", ()))})

    @property
    def mean(self) -> float:
        """Mean score over its tasks; NaN without any."""
        scores = self.scores or {}
        return math.fsum(scores.values()) / len(scores) if scores else math.nan

    @property
    def standing(self) -> str:
        """`lost`, `adopted` or `kept`: a class of the style sheet."""
        return "lost" if self.fault else "adopted" if self.adopted else "kept"


Archive = Mapping[str, ArchivedCandidate]  # by id, in the order in which they came


def parts_of(run: Path) -> dict[str, Mapping[str, Any]]:
    """The states of a run's parts by name, as far as they are JSON, in its newest checkpoint."""
    checkpoint = newest_checkpoint(run)
    paths = sorted(checkpoint.glob("trainer/parts/*/state.json")) if checkpoint else []
    return {path.parent.name: read_json(path) for path in paths}


def archive_of(state: Mapping[str, Any]) -> dict[str, ArchivedCandidate] | None:
    """The archive that a part's state holds; None if it is no search's."""
    entries = state.get("candidates")
    if not isinstance(entries, list) or not entries:
        return None
    if not all(isinstance(each, Mapping) and {"id", "values"} <= each.keys() for each in entries):
        return None
    return {each["id"]: ArchivedCandidate.of(each) for each in entries}


def shown_of(archive: Archive) -> dict[str, ArchivedCandidate]:
    """At most `MAX_CANDIDATES` of an archive, in its order: those that were adopted and the best
    ones, each with the chain of its first parents."""
    if len(archive) <= MAX_CANDIDATES:
        return dict(archive)
    ranked = sorted(
        archive.values(), key=lambda c: (-c.adopted, math.inf if math.isnan(c.mean) else -c.mean)
    )
    chosen: set[str] = set()
    for candidate in ranked:
        line: list[str] = []
        following: ArchivedCandidate | None = candidate
        while following is not None and following.id not in chosen:
            line.append(following.id)
            following = archive.get(following.parents[0]) if following.parents else None
        if len(chosen) + len(line) <= MAX_CANDIDATES:
            chosen.update(line)
    return {id: candidate for id, candidate in archive.items() if id in chosen}


def origin_of(archives: Sequence[Archive], name: str, value: Any) -> ArchivedCandidate | None:
    """The candidate from which a value in force has come: the one adopted last that has it, else
    the first one that is not lost; None if no archive knows it."""
    having = [
        candidate
        for archive in archives
        for candidate in archive.values()
        if not candidate.fault and name in candidate.values and candidate.values[name] == value
    ]
    return max(having, key=lambda candidate: candidate.adopted, default=None)


def scores_of(candidate: ArchivedCandidate) -> str:
    """Its mean score and on how many tasks, in words."""
    if not candidate.scores:
        return "no score"
    count = len(candidate.scores)
    return f"{candidate.mean:.3f} on {count} task{'s' if count > 1 else ''}"


def reasons(candidate: ArchivedCandidate) -> str:
    """Who proposed a candidate, why, why it is lost, and what the gate said, as HTML."""
    facts = (
        ("proposed by", candidate.proposer, ""),
        ("why", candidate.note, ""),
        ("lost", candidate.fault, "bad"),
        ("the gate said", candidate.verdict, ""),
    )
    rows = "".join(
        f'<p class="reason"><small>{name}</small> <span class="{kind}">{text(said)}</span></p>'
        for name, said, kind in facts
        if said
    )
    return rows


def candidate_details(
    candidate: ArchivedCandidate, archive: Archive, anchor: str, trials: str = ""
) -> str:
    """A candidate to unfold: where it comes from, its score, what it changes in its first parent,
    and what was tried from it. `trials`: what finds its trials among the episodes."""
    parents = ", ".join(candidate.parents)
    facts = [
        f"round {candidate.round}" if candidate.round else "",
        f"from {text(parents)}" if parents else "",
        text(candidate.proposer, 40),
        scores_of(candidate) if not candidate.fault else "lost",
        f"adopted as number {candidate.adopted}" if candidate.adopted else "",
    ]
    head = " · ".join(fact for fact in facts if fact)
    parent = archive.get(candidate.parents[0]) if candidate.parents else None
    read = f'<p><a href="#kind=trial&amp;q={quote(trials)}">its trials</a></p>' if trials else ""
    return (
        f'<details id="{anchor}" class="candidate {candidate.standing}"><summary><b>'
        f"{text(candidate.id)}</b> <small>{head}</small></summary>{reasons(candidate)}{read}"
        f"{_values(candidate, parent)}{_tried_from(candidate, archive)}</details>"
    )


def _tried_from(candidate: ArchivedCandidate, archive: Archive) -> str:
    """What was made from this candidate alone, with what came of it; a proposer is told this as
    its experience."""
    children = [each for each in archive.values() if each.parents == (candidate.id,)]
    rows = [
        f"<li><b>{text(child.id)}</b> {text(child.note, 120)} <small>"
        f"{'lost: ' + text(child.fault, 120) if child.fault else scores_of(child)}</small></li>"
        for child in children[:MAX_TRIED]
    ]
    more = len(children) - len(rows)
    rows += [f'<li class="soft">{more} more</li>'] if more else []
    return f"<h4>tried from it</h4><ul>{''.join(rows)}</ul>" if rows else ""


def _values(candidate: ArchivedCandidate, parent: ArchivedCandidate | None) -> str:
    """What a candidate changes, or the whole of one without a parent."""
    before = parent.values if parent is not None else {}
    changed = {n: v for n, v in candidate.values.items() if n not in before or before[n] != v}
    shown = [
        f"<h4>{text(name)}</h4>{_change(before.get(name), value)}"
        for name, value in list(changed.items())[:MAX_VALUES]
    ]
    more = len(changed) - len(shown)
    return "".join(shown) + (f'<p class="soft">{more} more values differ</p>' if more else "")


def _change(old: Any, new: Any) -> str:
    if old is None:
        return whole_text(as_text(new))
    if isinstance(old, (bool, int, float)) and isinstance(new, (bool, int, float)):
        return f"<p>{number(old)} → {number(new)}</p>"
    if as_logits(new) is not None:
        return f"<p>{_moved(as_logits(old) or {}, as_logits(new) or {})}</p>"
    return text_diff(as_text(old), as_text(new))


def _moved(old: Mapping[str, Mapping[str, float]], new: Mapping[str, Mapping[str, float]]) -> str:
    """Which logits differ, the largest changes first."""
    changes = [
        (value - old.get(name, {}).get(option, 0.0), f"{name} {option}".strip())
        for name, row in new.items()
        for option, value in row.items()
    ]
    moved = sorted((c for c in changes if c[0]), key=lambda change: -abs(change[0]))
    return "; ".join(f"{text(what)} {by:+.3f}" for by, what in moved[:12])
