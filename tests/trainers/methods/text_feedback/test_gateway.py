"""TextGrad on a program that knows nothing of marlora: the prompts of its agents are rewritten where
the gateway puts them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.text.tags import inside
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.gateway.programs import Function
from tests.trainers.feedback_run import scripted, trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CARRY = "Mind the carry."


def adds(system: str, question: str) -> str:
    """The two roles of the program: `first` loses the carry unless its system message speaks of it,
    `last` adds the third digit."""
    numbers = [int(number) for number in question.split("+")]
    if len(numbers) == 2:
        assert system == "last", "the program's own, word for word"
        return str(sum(numbers))
    total = numbers[0] + numbers[1]
    return str(total if CARRY in system else total % 10)


def criticises(question: str) -> str:
    """Of the output, and then along its edges, what was said of it."""
    given = re.findall(r"<FEEDBACK>\n(.*?)\n</FEEDBACK>", question, re.S)
    return " ".join(given) if given else ("fine" if "correct: 1" in question else "ten too few")


def rewrites(question: str) -> str:
    value = inside(question, "VARIABLE") or ""
    fault = "ten too few" in question and CARRY not in value
    return f"<IMPROVED_VARIABLE>{value} {CARRY if fault else ''}</IMPROVED_VARIABLE>"


def run(folder: Path, model: Path, **changes: Any) -> Any:
    system = Function(["first", "last"], main="marlora.recipes.programs.openai_roles:main")
    return trainer(
        folder,
        model,
        system=system,
        say=scripted(adds, criticises, rewrites),
        tasks="marlora.rollouts.tasks.toy:tiny_tasks",
        agents={name: {"policy": "base"} for name in ("first", "last")},
        params=["first.prompt"],
        num_val_tasks=6,
        num_eval_tasks=8,
        **{"max_steps": 2, **changes},
    )


def test_a_programs_prompt_is_rewritten_and_stands_in_place_of_its_own(
    model: Path, tmp_path: Path
) -> None:
    made = run(tmp_path / "run", model)
    summary = made.train()
    before, after = (summary["eval"][when]["accuracy"] for when in ("before", "after"))
    assert before < after == 1
    assert made.run.values == {"first.prompt": CARRY}
    folder = tmp_path / "run"
    values = folder / "checkpoints" / "step-000002" / "values" / "values.json"
    assert json.loads(values.read_text(encoding="utf-8")) == made.run.values
    systems = {
        (bool(episode.state) and turn.agent, turn.messages[0].content)
        for episode in Store(folder / "episodes")
        if episode.kind in ("train", "eval")
        for turn in episode.turns
    }
    assert systems == {("first", "first"), ("first", CARRY), ("last", "last")}
    asked = [e for e in Store(folder / "episodes") if e.kind == "aside"]
    assert any(e.task.id.endswith("/output-0") for e in asked), "along the edge between its calls"


def test_without_feedback_a_programs_prompt_stays_its_own(model: Path, tmp_path: Path) -> None:
    """Control: the same calls, and nothing is said to the rewriter."""
    made = run(tmp_path / "run", model, feedback="none")
    summary = made.train()
    assert summary["eval"]["after"]["accuracy"] == summary["eval"]["before"]["accuracy"]
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 2 and not made.run.values
