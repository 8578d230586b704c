"""Methods of feedback in words on the signs: they learn from feedback and from nothing else, and the
report shows which feedback moved which text. What they have to do alike besides stands in
`test_alike.py`."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from tests.trainers.feedback_run import HELPERS, METHODS, SIGNS, at_random, run_of, scripted
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name in METHODS if name != "textgrad_prompts"]  # whose own file has these tests


@pytest.fixture(scope="module", params=NAMES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> tuple[str, Any]:
    """The name of a method, and a finished run of it."""
    made = run_of(request.param, tmp_path_factory.mktemp("runs") / "run", model)
    made.train()
    return request.param, made


def summary_of(made: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (made.args.folder / "summary.json").read_text(encoding="utf-8")
    )
    return found


def test_it_learns_and_the_report_shows_why(trained: tuple[str, Any]) -> None:
    """Texts as diffs, and beside each the feedback that moved it and the param that it reached."""
    _, made = trained
    summary = summary_of(made)
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    value = made.run.values["solver.prompt"]
    assert all(f"{sign} means {name}." in value for sign, name in SIGNS.items())
    assert summary["tokens"]["trained"] == 0 and summary["steps"] == 4
    assert {e.kind for e in Store(made.args.folder / "episodes")} >= {"train", "trial", "aside"}
    report = html.unescape((made.args.folder / "report.html").read_text(encoding="utf-8"))
    adopted = [c for c in made.feedback.search.candidates if c.adopted and c.parents]
    assert "<ins>" in report and len(adopted) >= 2
    for candidate in adopted:
        first = candidate.note.splitlines()[0]
        assert first.startswith("solver.prompt: ") and first in report
        assert candidate.proposer == "optimizer"
    team = made.args.folder / "checkpoints" / "step-000004" / "system.json"
    assert "optimizer" not in team.read_text(encoding="utf-8"), "helpers are none of the team's"


@pytest.mark.slow
@pytest.mark.parametrize("control", ["shuffled", "none", "random"])
def test_controls_do_worse(
    control: str, trained: tuple[str, Any], model: Path, tmp_path: Path
) -> None:
    """Feedback of other tasks, none, or drawn proposals, at no fewer calls of the team and of
    helpers. Of LLM-AutoDiff's 20 drawn proposals the gates find some that are right by chance."""
    name, made = trained
    changed = {"say": at_random(name, 1)} if control == "random" else {"feedback": control}
    other = run_of(name, tmp_path / "run", model, **changed)
    summary, best = other.train(), summary_of(made)
    for helper, row in best["ledger"]["aside"].items():
        assert summary["ledger"]["aside"][helper]["calls"] >= row["calls"], helper
    most = 2 / 3 if (name, control) == ("llm_autodiff", "random") else 1 / 3
    assert summary["eval"]["after"]["accuracy"] <= most < 1


@pytest.mark.parametrize("name", NAMES)
def test_a_task_cannot_forge_a_value(name: str, model: Path, tmp_path: Path) -> None:
    """The tasks hold values between the tags of every optimizer's reply, and the optimizer repeats
    what it is shown; of that REVOLVE reads the value in force, which stands in its other tag."""

    def repeats(question: str) -> str:
        return question.partition("Reply with")[0]

    say = scripted(backward=lambda q: q, evaluator=lambda q: q, optimizer=repeats)
    sampling = {"temperature": 0, "max_tokens": 4000}
    made = run_of(
        name,
        tmp_path / "run",
        model,
        tasks="tests.trainers.feedback_run:forging",
        helpers={helper: {"prompt": f"I am {helper}", "sampling": sampling} for helper in HELPERS},
        engine=ScriptedEngine(say, context=200_000),
        max_steps=1,
        **({"evaluator_tokens": 8000} if name == "aime" else {}),
    )
    made.train()
    (row,) = rows(tmp_path / "run")
    found = row["text_feedback"]
    lost = "unchanged" if name == "revolve" else "unreadable"
    assert found[lost] == found["proposals"] and made.run.values == {}
    asked = [e for e in Store(tmp_path / "run" / "episodes") if e.task.id.startswith("optimizer")]
    assert any("obey" in e.output for e in asked)
