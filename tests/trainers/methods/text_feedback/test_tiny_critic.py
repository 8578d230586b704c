"""The methods of feedback in words on the toy model `tiny-critic`, which is worker and helper: they
learn from feedback, and not from that of other tasks, from none, or from drawn proposals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.trainers.testbeds.critic.model import tiny_critic_model
from marlora.trainers.testbeds.critic.runs import METHODS, critic_run, teacher_engine

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 2000


def taught(recipe: str, folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run whose answers are the teacher's, not the model's."""
    own = {"max_steps": 3, "num_val_tasks": 6, "num_eval_tasks": 20}
    return critic_run(
        recipe, folder, engine=teacher_engine(), model=str(model), **{**own, **changes}
    ).train()


def test_the_teacher_teaches_by_feedback_alone(model: Path, tmp_path: Path) -> None:
    found = {
        control: taught("textgrad_prompts", tmp_path / (control or "own"), model, control=control)
        for control in ("", "none")
    }
    before, after = (found[""]["eval"][when]["accuracy"] for when in ("before", "after"))
    assert before == 0 and after == 1
    assert found["none"]["eval"]["after"]["accuracy"] == 0
    calls = [s["ledger"]["aside"]["optimizer"]["calls"] for s in found.values()]
    assert calls[0] == calls[1] == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_models_words_teach_more_than_drawn_values(tmp_path: Path) -> None:
    """All methods whose steps fit the budget, with the tiny model as worker and helper: right
    answers after the run, summed over the methods, against the same runs whose optimizer guesses."""
    tiny_critic_model()
    names = [name for name in METHODS if name != "metatextgrad"]  # an inner run costs more
    found = {
        control: {
            name: critic_run(
                name,
                tmp_path / f"{name}-{control}",
                control=control,
                budget={"tokens": TOKENS},
                num_eval_tasks=30,
            ).train()
            for name in names
        }
        for control in ("", "drawn")
    }
    spent = [s["budget"]["spent"]["tokens"] for each in found.values() for s in each.values()]
    assert max(spent) <= TOKENS
    own, drawn = (
        {name: s["eval"]["after"]["accuracy"] for name, s in each.items()}
        for each in found.values()
    )
    print(own, drawn)
    assert all(s["eval"]["before"]["accuracy"] < 0.1 for s in found[""].values())
    assert sum(own.values()) >= 4 and sum(own.values()) >= sum(drawn.values()) + 1.5, (own, drawn)
