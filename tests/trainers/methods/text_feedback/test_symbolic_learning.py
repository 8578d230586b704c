"""Symbolic learning's runs: a state gets an editor because one is asked for, and a pipeline that is
worse is put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.pipeline import Pipeline
from marlora.agents.types import Sampling, SettingError, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.methods.text_feedback.symbolic_learning import (
    DECLINE,
    HIGH,
    SymbolicLearningConfig,
    SymbolicLearningTrainer,
    kinds_of,
    rolls_back,
    stops,
)
from tests.trainers.feedback_run import CHAT, trainer
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
WORTH = {"draft": 0.4, "edited": 0.8, "ruined": 0.2}
ADD_EDITOR = [{"op": "add_role", "role": "editor", "about": "You edit.", "instruction": "Edit it."}]
RUIN = [
    {"op": "add_node", "state": "ruin", "about": "", "next": []},
    {"op": "update_edges", "state": "write", "next": ["ruin"]},
]


def poems(split: str, seed: int = 0, **_: Any) -> list[Task]:
    count = 16 if split == "train" else 4
    return [Task(f"{split}{n}", f"Poem {n} of {split}.", "", split=split) for n in range(count)]


def worth(task: Task, episode: Episode) -> float:
    return WORTH[str(episode.output)]


def says(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The worker by its place, and the helpers: an editor is asked for as long as there is none;
    once there is one, the whole is ruined."""
    messages = CHAT.findall(prompt)
    system = messages[0][1]
    user = [text for role, text in messages if role == "user"][-1]
    if system.startswith("I am evaluator"):
        return "It needs an editor." if "draft" in user else "It is fine."
    if system.startswith("I am backward"):
        said = "Add an editor." if "needs an editor" in user else "Keep it."
        return f"<SUGGESTION>{said}</SUGGESTION>"
    if system.startswith("I am optimizer"):
        found: Any = [] if "The state" in user else {}
        if "Add an editor." in user and "The state" in user:
            found = ADD_EDITOR
        if "The pipeline:" in user:
            found = RUIN if "ruin" not in user and "editor" in user else []
        return f"So:\n<RESULT>\n{json.dumps(found)}\n</RESULT>"
    place = user.split("]")[0]
    return {"[write/writer": "draft", "[write/editor": "edited"}.get(place, "ruined")


WRITE = {
    "begin": "write",
    "states": {
        "write": {
            "about": "writes",
            "roles": {
                "writer": {
                    "agent": "worker",
                    "about": "You write.",
                    "template": "{about}\n{task}\n{prompt}\n{previous}",
                    "parts": {"task": "Write it."},
                }
            },
            "route": "order",
            "first": "writer",
            "next": [],
        }
    },
}


def symbolic(folder: Path, model: Path, **changes: Any) -> SymbolicLearningTrainer:
    settings: dict[str, Any] = dict(
        system=Pipeline(["worker"], pipeline=WRITE),
        agents={"worker": {"policy": "base"}},
        say=says,
        tasks="tests.trainers.methods.text_feedback.test_symbolic_learning:poems",
        rewards=["tests.trainers.methods.text_feedback.test_symbolic_learning:worth"],
        kinds=["node", "pipeline"],
        num_val_tasks=4,
        max_steps=2,
    )
    made: SymbolicLearningTrainer = trainer(
        folder,
        model,
        cls=SymbolicLearningTrainer,
        config=SymbolicLearningConfig,
        **{**settings, **changes},
    )
    return made


def symbolic_rows(folder: Path) -> list[dict[str, Any]]:
    return [{**row["text_feedback"], **row["symbolic_learning"]} for row in rows(folder)]


def test_an_editor_is_added_and_what_ruins_the_pipeline_is_kept_out(
    model: Path, tmp_path: Path
) -> None:
    """The sheet's script, with the gate on validation tasks: .4 becomes .8, and .2 never is."""
    made = symbolic(tmp_path / "run", model)
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == pytest.approx(0.4)
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(0.8)
    value = made.run.values["pipeline"]
    assert list(value["states"]["write"]["roles"]) == ["writer", "editor"]
    first, second = symbolic_rows(tmp_path / "run")
    assert (first["kinds"], second["kinds"]) == (["node"], ["pipeline"])
    assert first["adopted"] and not second["adopted"] and second["verdicts"][0].startswith("worse")
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    # nothing is required of what came before, so the last turns alone are asked about
    assert calls == {"evaluator": 4, "backward": 2 + 2, "optimizer": 2}
    saved = tmp_path / "run" / "checkpoints" / "step-000002" / "values" / "values.json"
    assert json.loads(saved.read_text(encoding="utf-8")) == {"pipeline": value}
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "editor" in report


@pytest.mark.slow
@pytest.mark.parametrize("rollback", [True, False])
def test_a_pipeline_that_is_worse_is_put_back_by_the_next_batch(
    rollback: bool, model: Path, tmp_path: Path
) -> None:
    """The sheet's script as their code runs it: without a gate, .4, .8, then .2 rolls back."""
    made = symbolic(
        tmp_path / "run", model, gate="always", num_val_tasks=0, rollback=rollback, max_steps=3
    )
    summary = made.train()
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(0.8 if rollback else 0.2)
    found = symbolic_rows(tmp_path / "run")
    assert [row["rolled_back"] for row in found] == [False, False, rollback]
    scores = made.memory["scores"]
    assert scores == pytest.approx([0.4, 0.8, 0.8 if rollback else 0.2]), "none is of the worse one"
    current = made.feedback.search.current
    assert current is not None and ("ruin" in json.dumps(current.values)) == (not rollback)


@pytest.mark.slow
def test_calls_of_a_step(model: Path, tmp_path: Path) -> None:
    """Fact U4: b = 2, s = 3, kind prompt: L 2 + G 6 + U 3 = 11."""

    def other(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        text = says(prompt, ref, sampling, k)
        if "<SUGGESTION>" in text:
            return text + "<REQUIREMENT>Do more.</REQUIREMENT>"
        return "draft" if text == "ruined" else text

    summary = symbolic(
        tmp_path / "run",
        model,
        system=Pipeline(["a", "b", "c"]),
        agents={name: {"policy": "base"} for name in "abc"},
        say=other,
        kinds=["prompt"],
        max_steps=1,
    ).train()
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls == {"evaluator": 2, "backward": 6, "optimizer": 3} and sum(calls.values()) == 11
    played = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "train"]
    assert sum(len(e.turns) for e in played) == 6


@pytest.mark.slow
def test_batches_go_through_all_tasks(model: Path, tmp_path: Path) -> None:
    """Fact U5: of 10 tasks in batches of 4 upstream plays 0-3, 4-7, 0-3, 0-3; here all have been
    played before one is again."""
    made = symbolic(tmp_path / "run", model, num_val_tasks=6, tasks_per_step=4, max_steps=1)
    tasks = [task.id for step in (1, 2, 3) for task in made.spec.tasks_of(step)]
    assert len(made.spec.tasks) == 10 and len(set(tasks[:10])) == 10


@pytest.mark.slow
def test_the_control_without_suggestions_changes_nothing(model: Path, tmp_path: Path) -> None:
    def quiet(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        text = says(prompt, ref, sampling, k)
        return "<SUGGESTION>Do well.</SUGGESTION>" if "<SUGGESTION>" in text else text

    made = symbolic(tmp_path / "run", model, say=quiet, kinds=["node"])
    summary = made.train()
    assert made.run.values == {}
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(0.4)
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 2, "as many calls"


@pytest.mark.slow
def test_helpers_that_answer_in_another_format_change_nothing(model: Path, tmp_path: Path) -> None:
    """For whole steps: each edit is asked for four times, counted once, and dropped."""

    def wordy(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        text = says(prompt, ref, sampling, k)
        return "I would add an editor." if "<RESULT>" in text else text

    made = symbolic(tmp_path / "run", model, say=wordy)
    summary = made.train()
    assert made.run.values == {} and summary["steps"] == 2
    assert [row["unreadable"] for row in symbolic_rows(tmp_path / "run")] == [1, 1]
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 8


def test_kinds_of_steps() -> None:
    """Fact U1; in every order the first step makes the first kind alone."""

    def of(kinds: list[str], order: str = "order") -> list[list[str]]:
        return [kinds_of(step, kinds, order, 0) for step in (1, 2, 3, 4)]

    assert of(["prompt", "node"]) == [["prompt"], ["node"], ["prompt"], ["node"]]
    assert of(["pipeline", "node", "prompt"]) == [["pipeline"], ["node"], ["prompt"], ["pipeline"]]
    assert of(["prompt", "pipeline"], "up_to_down")[:2] == [["prompt"], ["pipeline", "prompt"]]
    assert of(["prompt", "pipeline"], "down_to_up")[:2] == [["prompt"], ["prompt", "pipeline"]]
    drawn = [kinds_of(step, ["prompt", "node"], "random", 0) for step in range(2, 30)]
    assert {tuple(each) for each in drawn} == {("prompt",), ("node",)}


def test_when_a_run_stops() -> None:
    """Fact U2: with m = 5 five scores go on, six equal ones stop, a rise among the last goes on."""
    assert stops([0.5] * 5, 1, 5) == "" and stops([0.5] * 6, 1, 5) == f"{DECLINE} for 5 steps"
    assert stops([0.5, 0.5, 0.5, 0.6, 0.6, 0.6], 1, 5) == ""
    assert stops([0.5] * 9, 1, 0) == ""
    assert stops([0.1, 0.95, 0.95, 0.95], 0.9, 0) == HIGH
    assert stops([0.95, 0.95, 0.9], 0.9, 0) == "" and stops([0.95, 0.95], 0.9, 0) == ""


def test_what_is_rolled_back() -> None:
    """Fact U3."""
    assert rolls_back(0.6, 0.5, 0.55)
    assert not rolls_back(0.6, 0.5, 0.5) and not rolls_back(0.5, 0.5, 0.9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": ["prompts"]}, "kinds: expected one of"),
        ({"kinds": []}, "kinds: expected different ones"),
        ({"params": ["worker.prompt"]}, "params: expected one structure"),
        ({"system": Chain(["worker"]), "params": ["pipeline"]}, "params: no param 'pipeline'"),
        ({"helpers": {"evaluator": {}, "backward": {}}}, "helpers.optimizer: missing"),
        ({"values": {"pipeline": {"begin": "x", "states": {}}}}, "values.pipeline: states"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        symbolic(tmp_path / "run", model, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)
