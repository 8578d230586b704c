"""LLM-AutoDiff's demonstrations: their weights, who is drawn, and runs that learn from a teacher's
examples alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import ModelRef
from marlora.trainers.methods.text_feedback.teacher_demos import demo_weights, drawn
from tests.trainers.feedback_run import (
    CHAT,
    EXAMPLE,
    OPERATIONS,
    SIGNS,
    Cut,
    dies_in_round,
    run_of,
    scripted,
    solve,
)
from tests.trainers.loop.test_state import facts
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD = " ".join(f"{sign} means {name}." for sign, name in SIGNS.items())


def test_weights_of_the_sheet() -> None:
    """Fact U4."""
    scores = zip([1, 1, 0, 1], [0, 1, 1, 0.5], strict=True)
    weights = demo_weights([{"teacher": t, "student": s} for t, s in scores])
    assert weights == pytest.approx([0.666656, 0.000007, 0.000007, 0.333331], abs=1e-6)
    assert sum(weights) == pytest.approx(1)


def test_drawn_by_their_weights_without_replacement() -> None:
    found = Counter(drawn("abc", [0.6, 0.3, 0.1], 1, random.Random(n))[0] for n in range(2000))
    for id, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
        assert found[id] / 2000 == pytest.approx(share, abs=0.04)
    assert sorted(drawn("abc", [1.0, 1e-5, 1e-5], 9, random.Random(0))) == ["a", "b", "c"]
    assert drawn("", [], 2, random.Random(0)) == []


def by_example(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """A solver that knows a sign if a demonstration has it; helpers say nothing of use."""
    say = scripted(optimizer=lambda q: "<METHOD>m</METHOD>")
    messages = CHAT.findall(prompt)
    *shown, asked = [EXAMPLE.search(text) for role, text in messages if role == "user"]
    if asked is None or dict(messages).get("system", "").startswith("I am"):
        return say(prompt, ref, sampling, k)
    if any(each is not None and each[2] == asked[2] for each in shown):
        return str(OPERATIONS[SIGNS[asked[2]]](int(asked[1]), int(asked[3])))
    return solve(dict(messages).get("system", ""), asked[0])


def shown(folder: Path, model: Path, **changes: Any) -> Any:
    settings = {
        "num_demos": 3,
        "teacher": {"solver.prompt": GOOD},
        "num_proposals": 1,
        "say": by_example,
        "max_steps": 3,
    }
    return run_of("llm_autodiff", folder, model, **{**settings, **changes})


def test_a_team_learns_from_its_teachers_examples(model: Path, tmp_path: Path) -> None:
    """The texts stay as they are; each new set is strictly better on the validation tasks. A killed
    run comes to the same."""
    made = shown(tmp_path / "run", model)
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 0
    assert [*made.run.values] == ["solver.demos"]
    messages = made.run.values["solver.demos"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    known = {sign for sign in SIGNS for m in messages if sign in m["content"]}
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(len(known) / 3) and len(known) > 1
    pool = made.demos.pool["tasks"]
    assert {task["teacher"] for task in pool.values()} == {1.0}
    drawn_ids = [row["llm_autodiff"]["demos"]["drawn"] for row in rows(tmp_path / "run")]
    assert all(id in pool for ids in drawn_ids for id in ids)
    killed = shown(tmp_path / "cut", model)
    dies_in_round(killed, 5)
    with pytest.raises(Cut):
        killed.train()
    shown(tmp_path / "cut", model, resume=True).train()
    assert facts(tmp_path / "cut") == facts(tmp_path / "run")


def test_a_teacher_that_is_never_right_shows_nothing(model: Path, tmp_path: Path) -> None:
    made = shown(tmp_path / "run", model, teacher={"solver.prompt": "Think."}, max_steps=1)
    assert made.train()["eval"]["after"]["accuracy"] == 0
    (row,) = rows(tmp_path / "run")
    assert row["llm_autodiff"]["demos"] == {"pool": 0, "drawn": [], "adopted": False}
    assert made.run.values == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": {}}, "num_demos: 3 with teacher {}; expected both"),
        ({"num_demos": 0}, "num_demos: 0 with teacher {'solver.prompt'"),
        ({"teacher": {"solver.policy": "large"}}, "teacher.solver.policy: no policy 'large'"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        shown(tmp_path / "run", model, **settings).train()
    assert words in str(refused.value) and "\n" not in str(refused.value)
