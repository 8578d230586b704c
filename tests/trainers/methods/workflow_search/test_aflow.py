"""AFlow's runs on functions: it learns to vote, where random edits and copies do not; what is
broken is lost with its reason; kills, budgets and checkpoints change nothing."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.program import Program
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from tests.trainers.reading import rows
from tests.trainers.searches import (
    FIRST,
    engine,
    larger_ensemble,
    one_of,
    random_words,
    reply_with,
    search,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FORGED = "async def custom(instruction):\n    return problem\nawait custom('x')"
GOLD = "await custom('x')\nproblem.answer"
FAULTS = {
    "syntax": ("await custom('x'", "syntax:"),
    "import": ("import os\nos.listdir('/')\nawait custom('x')", "error:"),
    "time": ("while True:\n    pass\nawait custom('x')", "time:"),
    "calls": ("while True:\n    answer = await custom('x')\nanswer", "calls:"),
    "forging": (FORGED, "name: 'custom' is given and cannot be defined anew"),
    "gold": (GOLD, "error:"),
    "nothing": ("await custom('x')\nx = 1", "answer:"),
    "no operator": ("'7'", "nodes:"),
}


def test_broken_programs_are_lost_with_their_reason_and_not_repeated(
    model: Path, tmp_path: Path
) -> None:
    """Each round's first free edit of the list; after the last one only duplicates are left."""
    edits = [reply_with(f"E:{name}", program) for name, (program, _) in FAULTS.items()]
    made = search(
        tmp_path / "run",
        model,
        one_of(*edits),
        team={"max_calls": 4, "seconds": 0.1},
        max_steps=len(FAULTS) + 1,
        num_val_tasks=2,
        num_eval_tasks=2,
        tries=2,
    )
    summary = made.train()
    lost = {each["note"].removeprefix("E:"): each for each in summary["programs"] if each["fault"]}
    assert {name: lost[name]["fault"].startswith(fault) for name, (_, fault) in FAULTS.items()} == (
        dict.fromkeys(FAULTS, True)
    ), {name: each["fault"] for name, each in lost.items()}
    assert all(each["score"] is None and each["diff"] for each in lost.values())
    *_, last = rows(made.args.folder)
    assert last["program"]["fault"] == "duplicate" and last["program"]["duplicates"] == 2
    # nothing broken was played: two tasks of validation and two held-out ones, twice the same
    assert summary["ledger"]["trial"]["executor"]["calls"] == 2
    assert summary["state"]["values"]["program"]["sha256_after"]
    assert summary["eval"]["before"]["accuracy"] == summary["eval"]["after"]["accuracy"]


def test_a_program_that_breaks_on_real_answers_alone_costs_its_own_probe(
    model: Path, tmp_path: Path
) -> None:
    """Sketches answer "1", so the dry run ends; these executors do not say so twice."""
    endless = (
        "answer = await custom('one') + await custom('two')\n"
        "while answer != '11':\n    pass\nanswer"
    )
    summary = search(
        tmp_path / "run",
        model,
        one_of(reply_with("E:loop", endless)),
        team={"seconds": 0.1},
        max_steps=1,
        skill=0.0,
        probe=1,
        num_val_tasks=3,
        num_eval_tasks=1,
    ).train()
    (lost,) = [each for each in summary["programs"] if each["fault"]]
    assert lost["fault"].startswith("time:")
    assert summary["ledger"]["trial"]["executor"]["calls"] == 3 + 2


def test_the_proposer_is_shown_parent_experience_and_failures(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    edits = [reply_with(name, f"await custom('{name}')") for name in ("E:one", "E:two")]
    search(folder, model, one_of(*edits), max_steps=2, sample=1).train()
    asked = [e for e in Store(folder / "episodes") if e.kind == "aside"]
    first, second = (e.turns[0].messages[-1].content for e in asked)
    assert FIRST in first and "- await ensemble(solutions: list[str]) -> str" in first
    assert first.count("Question: train") in (1, 2, 3) and "Right answer: " in first
    assert "Prohibited" not in first and "- Prohibited, tried already: E:one (" in second
    assert all(turn.saw_gold for e in asked for turn in e.turns)


@pytest.mark.slow
def test_tasks_are_picked_by_variance_of_sampled_plays(model: Path, tmp_path: Path) -> None:
    """Scores of functions do not vary, so the first are picked; the others are not measured."""
    made = search(tmp_path / "run", model, random_words, max_steps=1, pick_tasks=2, pick_rounds=2)
    made.train()
    assert made.memory["tasks"] == [task.id for task in made.spec.val_tasks[:2]]
    assert all(len(c.scores) == 2 for c in made.search.candidates)
    with pytest.raises(SettingError, match="pick_tasks: 7 of 6"):
        search(tmp_path / "other", model, random_words, pick_tasks=7)


def test_a_checkpoint_is_evaluated_played_and_exported_with_its_program(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return engine(larger_ensemble)

    monkeypatch.setattr(team, "start_engine", start)
    folder = tmp_path / "run"
    summary = search(folder, model, larger_ensemble, max_steps=1, num_eval_tasks=20).train()
    checkpoint = folder / "checkpoints" / "step-000001"
    values = json.loads((checkpoint / "values" / "values.json").read_text(encoding="utf-8"))
    assert "await ensemble(" in values["program"] and 'WAY_0 = "' in values["program"]
    out = tmp_path / "eval"
    assert main(["eval", str(checkpoint), "--trust_checkpoint", "--output", str(out)]) in (0, None)
    again = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert again[when]["accuracy"] == summary["eval"][when]["accuracy"]
    assert summary["eval"]["after"]["accuracy"] > summary["eval"]["before"]["accuracy"]
    held_out = Counter(e.task.id for e in Store(folder / "episodes") if e.kind == "eval")
    assert len(held_out) == 20 and {*held_out.values()} == {2}, "of the first and of the best"
    monkeypatch.setattr("sys.stdin", io.StringIO("eval 3\n"))
    capsys.readouterr()
    assert main(["play", str(checkpoint), "--trust_checkpoint"]) in (0, None)
    played = capsys.readouterr().out
    assert played.count("[executor] was told: eval 3") == 4 and "Several solutions" in played
    main(["export", str(checkpoint), "--output", str(tmp_path / "team")])
    readable = (tmp_path / "team" / "program.py").read_text(encoding="utf-8")
    assert readable.endswith(values["program"] + "\n") and readable.startswith("# The program")


@pytest.mark.slow
def test_a_budget_ends_the_search_with_the_best_so_far(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = 6000
    summary = search(folder, model, larger_ensemble, budget={"tokens": limit}, max_steps=9).train()
    assert summary["done"] == "the budget is spent"
    assert 0 < summary["budget"]["spent"]["tokens"] <= limit
    assert 0 < summary["steps"] < 9 and summary["eval"]["after"]["accuracy"] is not None


@pytest.mark.slow
def test_it_learns_to_vote_and_controls_do_not(model: Path, tmp_path: Path) -> None:
    """Controls, with as many tokens: random edits of the instruction, and copies of the first
    program."""

    def copies(role: str, prompt: str) -> str:
        count = prompt.count("Prohibited") + prompt.count("Proposed in")
        return reply_with(f"copy {count}", f"{FIRST}  # copy {count}")

    settings: dict[str, Any] = dict(num_val_tasks=20, num_eval_tasks=40, converged_rounds=0)
    learnt = search(tmp_path / "votes", model, larger_ensemble, max_steps=4, **settings).train()
    assert learnt["eval"]["paired"]["ci95"][0] > 0.15
    budget = {"tokens": spent(learnt)}
    for propose in (random_words, copies):
        name = propose.__name__
        control = search(
            tmp_path / name, model, propose, max_steps=30, budget=budget, **settings
        ).train()
        assert control["done"] == "the budget is spent" and len(control["programs"]) > 4
        assert control["eval"]["paired"]["ci95"][0] < 0.05, name
    assert control["eval"]["paired"]["difference"] == 0, "copies are worth what the first is"


def spent(summary: dict[str, Any]) -> int:
    """Tokens of learning, that is, of everything but held-out evaluations."""
    return sum(
        row["prompt_tokens"] + row["sampled_tokens"]
        for kind in ("trial", "aside")
        for row in summary["ledger"][kind].values()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"helpers": ()}, "helpers.proposer: missing"),
        ({"validation_rounds": 2}, "validation_rounds: 2 plays at temperature 0 are all one"),
        ({"team": {"program": "1"}}, "program: no valid program (nodes:"),
        ({"uniform": 1.5}, "uniform"),
        ({"values": {"program": "import os"}}, "values.program: "),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    changes: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        search(tmp_path / "run", model, random_words, **changes)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_only_a_team_with_a_program_can_be_searched(model: Path, tmp_path: Path) -> None:
    made = search(tmp_path / "run", model, random_words)
    assert isinstance(made.spec.system, Program)
    with pytest.raises(SettingError, match=r"system\.class: Chain has no program"):
        type(made)(system=Chain(["executor"]), args=made.args, engine=engine(random_words))
