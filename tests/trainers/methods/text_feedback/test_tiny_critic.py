"""The methods of feedback in words on the toy model `tiny-critic` and on its teacher, which are
worker and helper: they learn from feedback more than from drawn values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.trainers.testbeds.critic.model import tiny_critic_model
from marlora.trainers.testbeds.critic.runs import (
    CONTROLS,
    GRADIENT,
    METHODS,
    critic_run,
    teacher_engine,
)
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 850
OWN_TOKENS, SEEDS = 600, 12


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


NAMES = [name for name in METHODS if name != "metatextgrad"]  # an inner run costs more


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_words_teach_more_than_drawn_values_of_the_same_tokens(tmp_path: Path) -> None:
    """Right answers after a run, summed over the methods, with the teacher as worker and helper and
    the model's tokens: against the same runs whose optimizer guesses."""
    model = tiny_critic_model()
    own, drawn = (
        {
            name: taught(
                name,
                tmp_path / f"{name}-{control}",
                model,
                control=control,
                max_steps=100,
                budget={"tokens": TOKENS},
            )
            for name in NAMES
        }
        for control in ("", "drawn")
    )
    spent = [s["budget"]["spent"]["tokens"] for s in (*own.values(), *drawn.values())]
    assert max(spent) <= TOKENS
    after = [sum(s["eval"]["after"]["accuracy"] for s in each.values()) for each in (own, drawn)]
    print(after)
    assert after[0] >= 4 and after[0] >= after[1] + 2, after


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", NAMES)
def test_the_tiny_model_speaks_every_methods_format(recipe: str, tmp_path: Path) -> None:
    """Values are proposed and judged, and next to no reply is unreadable."""
    critic_run(recipe, tmp_path / "run", max_steps=3, num_eval_tasks=4).train()
    found = [row["text_feedback"] for row in rows(tmp_path / "run")]
    assert sum(row["unreadable"] + row["unanswered"] + row["refused"] for row in found) <= 1
    assert any(row["verdicts"] for row in found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tiny_model_learns_from_its_own_feedback(tmp_path: Path) -> None:
    """The model is worker and helper: of so many TextGrad runs of the same tokens most end right
    with the feedback on each task, and few with that on another task, none, or drawn values."""

    def right(control: str, seed: int) -> float:
        summary = critic_run(
            "textgrad_prompts",
            tmp_path / f"{control}-{seed}",
            control=control,
            seed=seed,
            prompts={**GRADIENT, "rewrite_system": "edit!"},
            budget={"tokens": OWN_TOKENS},
            num_val_tasks=4,
            num_eval_tasks=10,
        ).train()
        assert summary["budget"]["spent"]["tokens"] <= OWN_TOKENS
        return float(summary["eval"]["after"]["accuracy"])

    own, *controls = (
        sum(right(control, seed) for seed in range(SEEDS)) / SEEDS for control in ("", *CONTROLS)
    )
    print(own, dict(zip(CONTROLS, controls, strict=True)))
    assert own >= 0.5 and own >= sum(controls) / len(controls) + 0.25
    assert own > max(controls)
