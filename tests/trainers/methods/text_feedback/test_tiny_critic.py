"""The methods of feedback in words on the toy model `tiny-critic`, which is worker and helper: they
learn from feedback, and not from that of other tasks, from none, or from drawn proposals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.trainers.testbeds.critic.model import tiny_critic_model
from marlora.trainers.testbeds.critic.runs import CONTROLS, METHODS, critic_run, teacher_engine

pytestmark = pytest.mark.usefixtures("one_thread")


def taught(recipe: str, folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run whose answers are the teacher's, not the model's."""
    own = {"max_steps": 6, "num_val_tasks": 9, "num_eval_tasks": 30, "seed": 2}
    return critic_run(
        recipe, folder, engine=teacher_engine(), model=str(model), **{**own, **changes}
    ).train()


def test_the_teacher_teaches_by_feedback_alone(model: Path, tmp_path: Path) -> None:
    found = {
        control: taught("textgrad_prompts", tmp_path / (control or "own"), model, control=control)
        for control in ("", "none")
    }
    before, after = (found[""]["eval"][when]["accuracy"] for when in ("before", "after"))
    assert before == 0 and after >= 0.6
    assert found["none"]["eval"]["after"]["accuracy"] <= after - 0.3
    calls = [s["ledger"]["aside"]["optimizer"]["calls"] for s in found.values()]
    assert calls[0] == calls[1] == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Summaries of a run of each method on the model, of the same tokens."""
    tiny_critic_model()
    folder = tmp_path_factory.mktemp("critic")
    return {name: critic_run(name, folder / name, **EQUAL).train() for name in METHODS}


EQUAL: dict[str, Any] = {"budget": {"tokens": 2500}, "seed": 0}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_methods_learn_from_a_tiny_models_words(trained: dict[str, dict[str, Any]]) -> None:
    gains = {
        name: summary["eval"]["after"]["accuracy"] - summary["eval"]["before"]["accuracy"]
        for name, summary in trained.items()
    }
    print(gains)
    assert all(s["budget"]["spent"]["tokens"] <= 2500 for s in trained.values())
    assert all(gain >= 0 for gain in gains.values()), gains
    assert sum(gain >= 0.25 for gain in gains.values()) >= 6, gains
    assert sum(gains.values()) / len(gains) >= 0.4, gains


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_controls_of_the_same_tokens_do_worse(
    trained: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    own = trained["textgrad_prompts"]["eval"]["after"]["accuracy"]
    found = {
        control: critic_run(
            "textgrad_prompts", tmp_path / control, control=control, **EQUAL
        ).train()["eval"]["after"]["accuracy"]
        for control in CONTROLS
    }
    print(own, found)
    assert max(found.values()) < own, (own, found)
