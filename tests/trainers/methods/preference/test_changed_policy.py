"""Preferences where a value says which policy an agent speaks with: that one learns, in every
mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.trainers.credit.pairs import pairs_of
from marlora.trainers.methods.preference import sysdpo
from marlora.trainers.methods.preference.drafts import output, with_drafts
from tests.trainers.methods.preference.test_sysdpo import moved, played, trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MAPPED = {"last.policy": "first"}


@pytest.mark.parametrize("mode", ["joint", "independent", "sampling"])
@pytest.mark.parametrize(("values", "learns"), [({}, {"first", "last"}), (MAPPED, {"first"})])
def test_the_policy_that_speaks_learns(
    mode: str, values: dict[str, str], learns: set[str], model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model, mode=mode, values=values, num_drafts=3)
    assert moved(made).keys() == learns


def test_an_output_is_quoted_as_the_policy_that_spoke_it(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, mode="sampling", values=MAPPED)
    _, episodes = played(made)
    with made.run:
        pairs = pairs_of(episodes, made.args, 0)
        drafted = with_drafts(made.run.rollouts, 1, pairs, 3)
        assert len(drafted) == len(pairs) > 0
        for before, after in zip(pairs, drafted, strict=True):
            for e in after.chosen:
                assert output(e).token_ids == output(before.chosen[0]).token_ids
                assert (output(e).agent, output(e).policy) == ("last", "first")


def test_trl_is_given_the_turns_of_every_agent_of_a_policy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path / "run", model, trainer="trl", mode="independent", values=MAPPED)
    given: dict[str, Any] = {}

    def noted(learner: Any, step: int, lessons: Any, make: Any) -> dict[str, Any]:
        given.update(lessons)
        return {}

    monkeypatch.setattr(sysdpo, "learn_with_trl", noted)
    with made.run as run:
        metrics = made.learn(1, run.rollouts.collect(1))
    assert given.keys() == {"first"} and metrics["preference"]["rows"]["first"] > 0
    assert any(reason.startswith("last: ") for reason in metrics["dropped"]), (
        "what the two were asked differs: turns of `last` are counted, not overlooked"
    )
