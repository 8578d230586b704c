"""Search: the archive of a method that proposes candidates, scores them and adopts some.

A method is three functions: `propose(parents, rng)` makes a candidate from its parents, `select`
picks the parents (`selection.py`), and a gate compares a candidate with another (`acceptance.py`).

    search = Search("search", seed)
    root = search.add(Candidate(values_at_start, proposer="start"))
    search.score(root.id, scores_of(root))
    candidate = search.ask(best, propose, round=step)
    if candidate is not None and not candidate.fault:
        candidate = search.score(candidate.id, scores_of(candidate))
        verdict = strictly_better(candidate, search.current)
        search.adopt(candidate.id, verdict) if verdict else search.reject(candidate.id, verdict)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...agents.seeds import derive_seed
from ...agents.types import SettingError, nearest
from .parts import JsonPart, json_copy, json_sha256


@dataclass(frozen=True)
class Candidate:
    """One setting of the params under search.

    Args:
        values: by name of a param, all params under search, also those that did not change.
        proposer: who made it: an agent, a rule, `start`.
        note: why, in the proposer's words.
        fault: why it is lost (no parsable reply, a refused value, code that raises); "" if it is
            not. A lost candidate stays in the archive and is never scored, selected or proposed
            again; without values it stands for a reply that gave none.
        id, parents, round: given by the search: its number in the archive, the ids of the
            candidates that it was made from, and the round.
        scores: by task id; a task that could not be scored has none.
        adopted: number of the adoption that last put it in force, 0 if it never was.
        verdict: what the gate said.
    """

    values: Mapping[str, Any]
    proposer: str = ""
    note: str = ""
    fault: str = ""
    id: str = ""
    parents: tuple[str, ...] = ()
    round: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    adopted: int = 0
    verdict: str = ""

    @property
    def mean(self) -> float:
        """Mean score over its tasks; NaN without any."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan

    @property
    def content(self) -> str:
        """SHA-256 of the values: equal for duplicates."""
        return json_sha256(self.values)


Select = Callable[[tuple[Candidate, ...], random.Random], tuple[Candidate, ...]]
Propose = Callable[[tuple[Candidate, ...], random.Random], Candidate]


class Duplicate(ValueError):
    """A candidate whose values are in the archive already."""


class Search(JsonPart):
    """The candidates of a search in the order in which they came, with parents, scores, faults and
    verdicts; a part of the run, so it is saved and resumed whole.

    Every random choice draws from `rng()`, a generator that follows from `seed` and the number of
    draws so far: a resumed search goes on as the uninterrupted one.

    A team sees nothing of it (`values()` is {}): the method proposes the adopted values as the
    team's next state. `duplicates` counts proposals that were in the archive already.
    """

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name)
        self.seed = seed
        self.duplicates = 0
        self._draws = 0
        self._adoptions = 0
        self._archive: dict[str, Candidate] = {}
        self._by_content: dict[str, str] = {}

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The whole archive, lost candidates included."""
        return tuple(self._archive.values())

    def __getitem__(self, id: str) -> Candidate:
        if id not in self._archive:
            raise KeyError(f"{self.name}: no candidate {id!r}; {nearest(id, list(self._archive))}")
        return self._archive[id]

    @property
    def current(self) -> Candidate | None:
        """The candidate in force: the one adopted last."""
        adopted = [candidate for candidate in self._archive.values() if candidate.adopted]
        return max(adopted, key=lambda candidate: candidate.adopted, default=None)

    def find(self, values: Mapping[str, Any]) -> Candidate | None:
        """The candidate with these values, lost or not; None if there is none."""
        id = self._by_content.get(json_sha256(values))
        return None if id is None else self._archive[id]

    def children(self, id: str) -> tuple[Candidate, ...]:
        """The candidates made from this one, in order: what was tried there, with what came of
        it."""
        return tuple(c for c in self._archive.values() if id in c.parents)

    def rng(self) -> random.Random:
        """The generator of the next random choice."""
        self._draws += 1
        return random.Random(derive_seed(self.seed, self.name, self._draws))

    def pool(self, tasks: Iterable[str] | None = None) -> tuple[Candidate, ...]:
        """The candidates that can be compared: not lost, and scored on each of `tasks`; their
        scores are those of `tasks`.

        None: all that have scores. Raises `ValueError` if they were scored on different tasks,
        whose means say nothing about one another.
        """
        alive = [c for c in self._archive.values() if not c.fault and c.scores]
        if tasks is not None:
            wanted = tuple(tasks)
            if not wanted:
                raise ValueError(f"{self.name}: no tasks to compare candidates on")
            return tuple(
                replace(c, scores={task: c.scores[task] for task in wanted})
                for c in alive
                if all(task in c.scores for task in wanted)
            )
        for candidate in alive:
            if candidate.scores.keys() != alive[0].scores.keys():
                raise ValueError(
                    f"{self.name}: candidates {alive[0].id} and {candidate.id} were scored on"
                    " different tasks; name the tasks on which they are compared"
                )
        return tuple(alive)

    def best(self, tasks: Iterable[str] | None = None) -> Candidate:
        """The candidate of `pool(tasks)` with the highest mean; the first of equal ones. Raises
        `ValueError` if the pool is empty."""
        pool = self.pool(tasks)
        if not pool:
            raise ValueError(f"{self.name}: no candidate is scored on these tasks yet")
        return self[max(pool, key=lambda candidate: candidate.mean).id]

    def select(self, select: Select, tasks: Iterable[str] | None = None) -> tuple[Candidate, ...]:
        """The parents that a rule of `selection.py` picks from `pool(tasks)`, with all their
        scores. Raises `ValueError` if the pool is empty."""
        pool = self.pool(tasks)
        if not pool:
            raise ValueError(f"{self.name}: no scored candidate to select from; score one first")
        return tuple(self[chosen.id] for chosen in select(pool, self.rng()))

    def ask(
        self,
        select: Select,
        propose: Propose,
        *,
        round: int = 0,
        tries: int = 1,
        tasks: Iterable[str] | None = None,
    ) -> Candidate | None:
        """A new candidate to score: parents by `select`, made by `propose`, put into the archive.

        A proposal that is in the archive already is counted and asked for anew, parents included,
        at most `tries` times in all; None if each was a duplicate. The candidate may be lost
        (`fault`).
        """
        tasks = None if tasks is None else tuple(tasks)
        for _ in range(tries):
            parents = self.select(select, tasks)
            proposed = propose(parents, self.rng())
            proposed = replace(proposed, parents=tuple(p.id for p in parents), round=round)
            try:
                return self.add(proposed)
            except Duplicate:
                continue
        return None

    def add(self, candidate: Candidate) -> Candidate:
        """Put a candidate into the archive; returns it with its id. Raises `Duplicate` if its
        values are there already, `SettingError` if a value is not JSON, `KeyError` for a parent
        that is not there."""
        values = json_copy(candidate.values, f"{self.name}: values")
        candidate = replace(
            candidate, id=str(len(self._archive)), values=values, adopted=0, verdict="", scores={}
        )
        for parent in candidate.parents:
            self[parent]
        known = self.find(values)
        if known is not None:
            self.duplicates += 1
            lost = f", lost: {known.fault}" if known.fault else ""
            raise Duplicate(f"{self.name}: candidate {known.id} has the same values{lost}")
        self._keep(candidate)
        return candidate

    def score(self, id: str, scores: Mapping[str, float]) -> Candidate:
        """Add a candidate's scores by task id; a task scored before takes the new score. Returns
        the candidate. Raises `ValueError` if it is lost or a score is not finite."""
        candidate = self[id]
        if candidate.fault:
            raise ValueError(f"{self.name}: candidate {id} is lost: {candidate.fault}")
        for task, score in scores.items():
            if not math.isfinite(score):
                raise ValueError(
                    f"{self.name}: score {score} of candidate {id} on task {task!r} is not finite;"
                    " leave out a task that could not be scored"
                )
        added = {task: float(score) for task, score in scores.items()}
        return self._replace(id, scores={**candidate.scores, **added})

    def lose(self, id: str, fault: str) -> Candidate:
        """Mark a candidate as lost, with the reason: its code does not run, its values were
        refused. It stays, so it is not proposed again. Returns the candidate."""
        if not fault:
            raise ValueError(f"{self.name}: expected the reason why candidate {id} is lost")
        if self[id].adopted:
            raise ValueError(f"{self.name}: candidate {id} was adopted and cannot be lost")
        return self._replace(id, fault=fault)

    def adopt(self, id: str, verdict: object = "") -> Candidate:
        """Make a candidate the current one; `verdict`: what the gate said. Returns the candidate.
        Raises `ValueError` if it is lost."""
        if self[id].fault:
            raise ValueError(f"{self.name}: candidate {id} is lost: {self[id].fault}")
        self._adoptions += 1
        return self._replace(id, adopted=self._adoptions, verdict=str(verdict))

    def reject(self, id: str, verdict: object) -> Candidate:
        """Record why a gate kept a candidate out. It stays selectable. Returns the candidate."""
        return self._replace(id, verdict=str(verdict))

    def _replace(self, id: str, **fields: Any) -> Candidate:
        self._archive[id] = replace(self[id], **fields)
        return self._archive[id]

    def _keep(self, candidate: Candidate) -> None:
        self._archive[candidate.id] = candidate
        if candidate.values or not candidate.fault:
            self._by_content[candidate.content] = candidate.id

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "draws": self._draws,
            "adoptions": self._adoptions,
            "duplicates": self.duplicates,
            "candidates": [
                {**asdict(candidate), "parents": list(candidate.parents)}
                for candidate in self._archive.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise SettingError(
                f"{self.name}: the search began with seed {state['seed']}, got {self.seed}; its"
                " choices follow from it"
            )
        self._draws, self._adoptions = state["draws"], state["adoptions"]
        self.duplicates = state["duplicates"]
        self._archive, self._by_content = {}, {}
        for saved in state["candidates"]:
            self._keep(Candidate(**{**saved, "parents": tuple(saved["parents"])}))
