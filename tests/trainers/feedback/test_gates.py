"""Gates: what they play, where they stop, and what passes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from marlora.agents.state import TeamState
from marlora.agents.types import Task
from marlora.trainers.collection.identified_episodes import Play
from marlora.trainers.feedback.gates import Gate, Scorer, TwoStageGate, ValidationGate
from marlora.trainers.loop.evaluator import Evaluator
from marlora.trainers.values.acceptance import Verdict
from marlora.trainers.values.search import Candidate, Search
from tests.trainers.feedback_cases import episode, turn


def test_a_candidate_is_measured_as_the_state_that_it_would_be() -> None:
    """Else its episodes would be played again once it is adopted."""
    own = {"a.prompt": "A", "b.prompt": "B", "c.prompt": "C"}
    scorer = Scorer(None, TeamState(values={"c.prompt": "D"}), [], own)  # type: ignore[arg-type]
    assert scorer.with_values({**own, "a.prompt": "new", "c.prompt": "C"}).values == {
        "a.prompt": "new",
        "c.prompt": "C",
    }
    assert scorer.with_values({**own, "c.prompt": "D"}).key == scorer.state.key


VAL = [Task(f"v{n}", f"question v{n}", "7") for n in range(10)]


class Played:
    """Rollouts whose scores stand in `scores`, one task at a time; `ids` are those that were
    played, by value."""

    def __init__(self, scores: dict[str, dict[str, float]]) -> None:
        self.scores, self.ids = scores, dict[str, list[str]]()
        self.config = SimpleNamespace(max_concurrency=1)
        self.ranks = SimpleNamespace(share=lambda work, cls: work())

    def play_or_find(self, what: Play) -> Any:
        assert what.state is not None
        value = what.state.values["p"]
        self.ids.setdefault(value, []).extend(task.id for task in what.tasks)
        played = [
            episode(turn(0, "a", "x"), task=task.id, score=self.scores[value][task.id])
            for task in what.tasks
        ]
        return SimpleNamespace(episodes=played)


def judged(
    gate: Gate, old: Sequence[float], new: Sequence[float], batch: int = 0
) -> tuple[Verdict, int, int]:
    """The verdict, and how many tasks of the batch and of the validation ones the new value was
    played on. The first `batch` scores are of the batch."""
    tasks = [Task(f"b{n}", f"question b{n}", "7") for n in range(batch)] + VAL
    scores = [{t.id: s for t, s in zip(tasks, own, strict=False)} for own in (old, new)]
    rollouts = Played({"old": scores[0], "new": scores[1]})
    evaluator = Evaluator([], VAL, "right", rollouts, None)  # type: ignore[arg-type]
    search = Search("candidates", 0)
    start = search.add(Candidate({"p": "old"}, proposer="start"))
    other = search.add(Candidate({"p": "new"}, parents=(start.id,)))
    val = VAL[: len(old) - batch]
    verdict = gate.judge(
        Scorer(evaluator, TeamState(), val), search, other.id, start.id, tasks[:batch]
    )
    played = rollouts.ids.get("new", [])
    return verdict, sum(id[0] == "b" for id in played), sum(id[0] == "v" for id in played)


SEVEN = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("rule", "new", "played", "passed"),
    [
        ("not_worse", [0, 1, 0, 0, 1, 0, 1, 1, 1, 1], 6, False),
        ("strictly_better", [0, 1, 0, 0, 1, 0, 1, 1, 1, 1], 4, False),
        ("not_worse", [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], 10, True),
        ("strictly_better", [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], 3, False),
        ("strictly_better", [0, 0, 1, 1, 1, 1, 1, 1, 1, 1], 10, True),
        ("always", [0] * 10, 0, True),
    ],
)
def test_validation_stops_early(rule: str, new: list[float], played: int, passed: bool) -> None:
    """Fact U3 of LLM-AutoDiff: of 10 tasks with at least .7 the first scores stop after 6, at a
    bound of .6, the others run to the end. Upstream stops so before a gate that an equal score does
    not pass; there we stop as soon as .7 cannot be exceeded."""
    verdict, _, on_val = judged(ValidationGate(rule), SEVEN, new)
    assert (on_val, bool(verdict)) == (played, passed)
    assert ("out of reach" in verdict.why) == (0 < played < 10)


@pytest.mark.parametrize(
    ("old", "new", "on_batch", "on_val", "passed"),
    [
        # (scores of two tasks of the batch, then of five validation ones)
        ([1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], 2, 5, True),
        ([1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1], 2, 0, False),
        ([1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], 1, 0, False),
        ([0, 0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0], 2, 5, False),
        ([0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 1], 2, 2, False),
        ([0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1], 2, 5, True),
        ([1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1], 2, 0, False),
    ],
)
def test_two_stages(
    old: list[float], new: list[float], on_batch: int, on_val: int, passed: bool
) -> None:
    """Fact U2 of LLM-AutoDiff: at the first gate (1, 1) passes and (.5, .5) does not; at the second
    (.6, .6) does not. What fails at the first is not played on validation tasks."""
    verdict, batch, val = judged(TwoStageGate(), old, new, batch=2)
    assert (batch, val, bool(verdict)) == (on_batch, on_val, passed)


def test_the_stages_have_rules_of_their_own() -> None:
    gate = TwoStageGate("always", "not_worse")
    assert judged(gate, [1, 1, 0, 1], [0, 0, 1, 0], batch=2)[0]
    assert not judged(TwoStageGate("not_worse", "always"), [1, 1, 0], [1, 0, 1], batch=2)[0]
