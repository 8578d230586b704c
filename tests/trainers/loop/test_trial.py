"""Updates that are tried and put back, and measurements that stop early."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlora.agents.types import Task
from tests.trainers import small_run
from tests.trainers.loop.test_run import state, step
from tests.trainers.loop.test_state import tuner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_trial_is_put_back_to_the_last_bit_and_served_as_before(
    model: Path, tmp_path: Path
) -> None:
    made = small_run.trainer(tmp_path / "run", model)
    tasks = [Task(f"v{n}", f"{n} + 1 + 1", "0", meta={"c": 1}) for n in range(2)]
    with made.run as run:
        step(made, 1)
        before, key = state(run), run.state.key
        worth = run.evaluator.measure(None, tasks)
        episodes = run.rollouts.collect(2)
        with run.trial() as trial:
            made.learn(2, episodes)
            assert run.state.key == key, "not served yet"
            trial.serve()
            assert state(run) != before and run.state.key != key
            tried = run.rollouts.play(tasks, greedy=True)
            assert {t.version for e in tried for t in e.turns} == set(run.state.versions.values())
        assert state(run) == before and run.state.key == key
        played = len(run.rollouts.store.ids())
        assert run.evaluator.measure(None, tasks) == worth
        assert len(run.rollouts.store.ids()) == played, "the same state, so nothing is played"
        with run.trial() as trial:
            made.learn(2, episodes)
            trial.adopt()
        assert state(run) != before


def test_what_was_tried_before_may_be_tried_again_also_the_untrained_team(
    model: Path, tmp_path: Path
) -> None:
    made = small_run.trainer(tmp_path / "run", model)
    tasks = [Task("v", "1 + 1 + 1", "0", meta={"c": 1})]
    with made.run as run:
        before, first = state(run), run.evaluator.measure(None, tasks)
        episodes = run.rollouts.collect(1)
        for _ in range(2):  # the same adapters again, in the same step
            with run.trial() as trial:
                made.learn(1, episodes)
                trial.serve()
                run.learner.reset(run.learner.trainable)
                trial.serve()
                assert run.state.versions == {}
            assert state(run) == before and run.evaluator.measure(None, tasks) == first


def test_trying_does_not_change_what_is_learnt(model: Path, tmp_path: Path) -> None:
    plain, tried = (
        small_run.trainer(tmp_path / "a", model),
        small_run.trainer(tmp_path / "b", model),
    )
    with plain.run as run:
        step(plain, 1)
        step(plain, 2)
        expected = state(run)
    with tried.run as run:
        step(tried, 1)
        episodes = run.rollouts.collect(2)
        with run.trial() as trial:
            tried.learn(2, episodes)
            trial.serve()
        step(tried, 2)
        assert state(run) == expected


def test_measuring_stops_once_the_bound_cannot_be_reached(model: Path, tmp_path: Path) -> None:
    """Two at once; the scores are 1/3 each."""
    made = tuner(tmp_path / "run", model, max_concurrency=2)
    with made.run as run:
        poor = run.state.with_values({"solver.prompt": "say 1"})
        tasks = made.spec.tasks[:4]
        result = run.evaluator.measure(poor, tasks, above=0.8)
        assert len(result.scores) == 2 and result.left == 2
        assert result.accuracy == pytest.approx((1 / 3 + 1 / 3) / 4)
        whole = run.evaluator.measure(poor, tasks, above=0.3)
        assert len(whole.scores) == 4 and whole.left == 0
        assert whole.accuracy == pytest.approx(1 / 3)
        assert run.ledger.rows()["trial"]["solver"]["calls"] == 4
