"""What every method of feedback in words has to do: learn from feedback and from nothing else, come
to the same after a kill, stay within its budget, ask outside models, be evaluated and shown."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from marlora.recipes.cli.main import main
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from tests.trainers.feedback_run import (
    METHODS,
    SIGNS,
    Cut,
    at_random,
    criticise,
    dies_in_round,
    rewrite,
    run_of,
    scripted,
    shuffled,
    silent,
)
from tests.trainers.loop.test_state import facts
from tests.trainers.outside import Outside

pytestmark = pytest.mark.usefixtures("one_thread")
OWN_TESTS = ("textgrad_prompts", "revolve")  # which have all of these in files of their own
NAMES = [name for name in METHODS if name not in OWN_TESTS]


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path):
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
@pytest.mark.parametrize("control", ["shuffled", "silent", "random"])
def test_controls_do_worse(
    control: str, trained: tuple[str, Any], model: Path, tmp_path: Path
) -> None:
    """Feedback of other tasks, none, or drawn proposals, at no fewer calls of the team and of
    helpers. Of LLM-AutoDiff's 20 drawn proposals the gates find some that are right by chance."""
    name, made = trained
    changed = {"shuffled": shuffled, "silent": silent}.get(control, lambda cls: cls)
    say = {"say": at_random(name, 1)} if control == "random" else {}
    own = METHODS[name]
    other = run_of(name, tmp_path / "run", model, cls=changed(own[0]), **say)
    summary, best = other.train(), summary_of(made)
    for helper, row in best["ledger"]["aside"].items():
        assert summary["ledger"]["aside"][helper]["calls"] >= row["calls"], helper
    most = 2 / 3 if (name, control) == ("llm_autodiff", "random") else 1 / 3
    assert summary["eval"]["after"]["accuracy"] <= most < 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 5])
def test_a_run_that_is_killed_inside_a_pass_comes_to_the_same(
    number: int, trained: tuple[str, Any], model: Path, tmp_path: Path
) -> None:
    name, whole = trained
    rounds = {"trace_opto": min(number, 4)}.get(name, number)
    killed = run_of(name, tmp_path / "run", model)
    dies_in_round(killed, rounds)
    with pytest.raises(Cut):
        killed.train()
    run_of(name, tmp_path / "run", model, resume=True).train()
    assert facts(tmp_path / "run") == facts(whole.args.folder)


@pytest.mark.slow
def test_evaluating_the_checkpoint_gives_what_the_run_says(
    trained: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(scripted())

    monkeypatch.setattr(team, "start_engine", start)
    _, made = trained
    out, checkpoint = tmp_path / "eval", made.args.folder / "checkpoints" / "step-000004"
    argv = ["eval", str(checkpoint), "--trust_checkpoint", "--output", str(out)]
    assert main(argv) in (0, None)
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary_of(made)["eval"][when]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [900, 6000])
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_never_exceeded(name: str, limit: int, model: Path, tmp_path: Path) -> None:
    summary = run_of(name, tmp_path / "run", model, budget={"tokens": limit}).train()
    assert summary["budget"]["spent"]["tokens"] <= limit and summary["steps"] < 4
    assert summary["done"] == "the budget is spent"
    assert summary["eval"]["after"]["accuracy"] is not None


def test_outside_models_help(trained: tuple[str, Any], model: Path, tmp_path: Path) -> None:
    """An OpenAI-compatible server is every helper of the method: the run comes to the same values,
    and its calls are on the ledger."""
    name, made = trained
    says = {"backward": criticise, "optimizer": rewrite, **METHODS[name][2]}

    def answer(body: dict[str, Any]) -> str:
        system, *_, user = (message["content"] for message in body["messages"])
        return str(says[system.removeprefix("I am ")](user))

    calls = {n: row["calls"] for n, row in summary_of(made)["ledger"]["aside"].items()}
    with Outside(answer) as outside:
        helpers = {
            helper: {
                "url": outside.url,
                "base": "big",
                "prompt": f"I am {helper}",
                "sampling": {"temperature": 0, "max_tokens": 600},
            }
            for helper in calls
        }
        summary = run_of(name, tmp_path / "run", model, helpers=helpers, max_steps=2).train()
        assert {body["model"] for body in outside.bodies} == {"big"}
        own = {n: row["calls"] for n, row in summary["ledger"]["aside"].items()}
        assert len(outside.bodies) == sum(own.values()) and own.keys() == calls.keys()
    assert summary["eval"]["after"]["accuracy"] >= 2 / 3
