"""TextGrad's runs: what they learn and what controls do not, their calls, kills, checkpoints,
budgets, outside helpers, and helpers that answer in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.text_feedback.textgrad import TextGradTrainer
from tests.trainers.feedback_run import (
    HELPERS,
    OPERATIONS,
    SIGNS,
    Cut,
    at_random,
    dies_in_round,
    rewrite,
    scripted,
    trainer,
)
from tests.trainers.loop.test_state import facts
from tests.trainers.outside import Outside
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")


def feedback_rows(folder: Path) -> list[dict[str, Any]]:
    return [row["text_feedback"] for row in rows(folder)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> TextGradTrainer:
    """A finished run; its folder holds what it came to."""
    made = trainer(tmp_path_factory.mktemp("runs") / "run", model)
    made.train()
    return made  # type: ignore[no-any-return]


def summary_of(made: TextGradTrainer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (made.args.folder / "summary.json").read_text(encoding="utf-8")
    )
    return found


def asides(folder: Path, step: int | None = None) -> list[Any]:
    return [e for e in Store(folder / "episodes") if e.kind == "aside" and step in (None, e.step)]


# what is learnt


def test_the_prompt_learns_what_failing_examples_teach(trained: TextGradTrainer) -> None:
    summary = summary_of(trained)
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    value = trained.run.values["solver.prompt"]
    assert all(f"{sign} means {name}." in value for sign, name in SIGNS.items())
    assert summary["tokens"]["trained"] == 0
    checkpoint = trained.args.folder / "checkpoints" / "step-000004"
    values = json.loads((checkpoint / "values" / "values.json").read_text(encoding="utf-8"))
    assert values == {"solver.prompt": value}
    adopted = [c for c in trained.feedback.search.candidates if c.adopted and c.parents]
    assert "means" in adopted[0].note, "the archive says which feedback moved which text"
    report = (trained.args.folder / "report.html").read_text(encoding="utf-8")
    assert adopted[0].note.splitlines()[0] in report and adopted[0].proposer == "optimizer"


@pytest.mark.slow
@pytest.mark.parametrize("control", ["shuffled", "none", "random"])
def test_controls_at_equal_budget_do_worse(
    control: str, trained: TextGradTrainer, model: Path, tmp_path: Path
) -> None:
    """As many calls of every helper, and feedback of other tasks, none, or drawn proposals."""
    say = at_random("textgrad_prompts", 1) if control == "random" else None
    feedback = "own" if control == "random" else control
    summary = trainer(tmp_path / "run", model, say=say, feedback=feedback).train()
    own, other = (
        {name: row["calls"] for name, row in each["ledger"]["aside"].items()}
        for each in (summary_of(trained), summary)
    )
    assert own == other
    assert summary["eval"]["after"]["accuracy"] <= 1 / 3, control


@pytest.mark.slow
def test_a_chain_of_two_learns_both_prompts(model: Path, tmp_path: Path) -> None:
    """Feedback reaches the first agent through the turn of the second, which copies."""
    from marlora.agents.patterns.chain import Chain

    def solver(system: str, question: str) -> str:
        from tests.trainers.feedback_run import solve

        return solve(system, question) if "Work" in system else question.splitlines()[-1]

    system = Chain(["solver", "last"], views={"last": "Copy:\n{previous}"})
    made = trainer(
        tmp_path / "run",
        model,
        system=system,
        say=scripted(solver),
        agents={
            "solver": {"policy": "base", "prompt": "Work it out."},
            "last": {"policy": "base", "prompt": "Copy."},
        },
        params=["solver.prompt"],
    )
    summary = made.train()
    assert summary["eval"]["after"]["accuracy"] == 1 and set(made.run.values) == {"solver.prompt"}
    (first, *_) = feedback_rows(tmp_path / "run")
    assert first["feedback"] == {"solver.prompt": 3}
    # per task: judgement to the last turn, that to the first turn, and that to its prompt
    assert len([e for e in asides(tmp_path / "run", 1) if "backward" in e.task.id]) == 9


# calls


@pytest.mark.parametrize(("loss", "evaluator"), [("rule", 0), ("judge", 3)])
def test_calls_of_a_step(loss: str, evaluator: int, model: Path, tmp_path: Path) -> None:
    """Facts U1 and U2: F 3, B 6 (3 base and 3 chain), O 1, three feedbacks on the prompt; with a
    judge E 3 besides. Upstream all six are asked by the second prompt then; here three are."""
    folder = tmp_path / "run"
    summary = trainer(folder, model, loss=loss, gate="always", num_val_tasks=0, max_steps=1).train()
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls == {"backward": 6, "optimizer": 1} | (
        {"evaluator": evaluator} if evaluator else {}
    )
    assert summary["ledger"]["train"]["solver"]["calls"] == 3 and "trial" not in summary["ledger"]
    texts = [e.task.prompt for e in asides(folder) if e.task.id.startswith("backward")]
    assert sum("got this feedback" in text for text in texts) == 3
    (row,) = feedback_rows(folder)
    assert row["feedback"] == {"solver.prompt": 3} and row["judged"] == 3


def test_who_saw_the_answer_is_marked(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer(folder, model, max_steps=1).train()
    turns = [turn for e in asides(folder) for turn in e.turns]
    assert turns and all(turn.saw_gold for turn in turns)
    hidden = tmp_path / "hidden"
    trainer(hidden, model, max_steps=1, loss="judge", show_answer=False).train()
    turns = [turn for e in asides(hidden) for turn in e.turns]
    assert turns and not any(turn.saw_gold for turn in turns)
    followed = {e.follows for e in asides(folder) if e.task.id.startswith("backward")}
    played = {e.id for e in Store(folder / "episodes") if e.kind == "train"}
    assert followed == played, "every question names the run it is about"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "right", "adopted"),
    [
        ("not_worse", "same", True),
        ("strictly_better", "same", False),
        ("not_worse", "worse", False),
        ("always", "worse", True),
    ],
)
def test_the_gate_compares_validation_scores(
    gate: str, right: str, adopted: bool, model: Path, tmp_path: Path
) -> None:
    """Fact U4: an equal score keeps the new prompt, a lower one reverts it."""

    def solver(system: str, question: str) -> str:
        a, sign, b = question.split()
        bad = right == "worse" and "new" in system and sign == "@"
        return "0" if bad else str(OPERATIONS[SIGNS[sign]](int(a), int(b)))

    say = scripted(solver, optimizer=lambda q: "<IMPROVED_VARIABLE>new</IMPROVED_VARIABLE>")
    made = trainer(tmp_path / "run", model, say=say, gate=gate, max_steps=1)
    made.train()
    assert made.run.values == ({"solver.prompt": "new"} if adopted else {})
    (update,) = made.feedback.history.updates
    assert update["status"] == ("adopted" if adopted else "rejected")


@pytest.mark.slow
def test_momentum_shows_earlier_values(model: Path, tmp_path: Path) -> None:
    """Upstream the class returns no prompt at all."""
    folder = tmp_path / "run"
    trainer(folder, model, momentum=2, max_steps=3).train()
    texts = [e.task.prompt for e in asides(folder) if e.task.id.startswith("optimizer")]
    assert ["Iteration 1:" in text for text in texts] == [False, True, True]


# after a kill


@pytest.mark.slow
@pytest.mark.parametrize("ask", [1, 2, 3, 8])
def test_a_run_that_is_killed_inside_a_backward_pass_comes_to_the_same(
    ask: int, trained: TextGradTrainer, model: Path, tmp_path: Path
) -> None:
    """Killed when half of the questions of its `ask`-th round (judgements to outputs, outputs to
    the prompt, the optimizer) are answered: nothing is asked or counted twice."""
    killed = trainer(tmp_path / "run", model)
    dies_in_round(killed, ask)
    with pytest.raises(Cut):
        killed.train()
    trainer(tmp_path / "run", model, resume=True).train()
    assert facts(tmp_path / "run") == facts(trained.args.folder)


@pytest.mark.slow
def test_a_run_whose_engine_failed_goes_on(
    trained: TextGradTrainer, model: Path, tmp_path: Path
) -> None:
    """The engine is gone in the middle of a round of questions, and there again."""
    engine = ScriptedEngine(scripted(), context=16_384, faults={30: Fault("raise")})
    with pytest.raises(EngineError, match="scripted fault"):
        trainer(tmp_path / "run", model, engine=engine).train()
    summary = trainer(tmp_path / "run", model, resume=True).train()
    expected = summary_of(trained)
    for key in ("eval", "state", "steps"):
        assert summary[key] == expected[key]


@pytest.mark.slow
def test_evaluating_the_checkpoint_gives_what_the_run_says(
    trained: TextGradTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(scripted())

    monkeypatch.setattr(team, "start_engine", start)
    out = tmp_path / "eval"
    checkpoint = trained.args.folder / "checkpoints" / "step-000004"
    argv = ["eval", str(checkpoint), "--trust_checkpoint", "--output", str(out)]
    assert main(argv) in (0, None)
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    summary = summary_of(trained)
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"]
    team_file = (checkpoint / "system.json").read_text(encoding="utf-8")
    assert "optimizer" not in team_file, "helpers are none of the team's"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [900, 6000, 15000])
def test_a_budget_is_never_exceeded_and_the_run_ends_whole(
    limit: int, model: Path, tmp_path: Path
) -> None:
    summary = trainer(tmp_path / "run", model, budget={"tokens": limit}).train()
    assert summary["budget"]["spent"]["tokens"] <= limit
    assert summary["done"] == "the budget is spent" and summary["steps"] < 4
    assert summary["eval"]["after"]["accuracy"] is not None


# outside helpers


def test_an_outside_model_helps(trained: TextGradTrainer, model: Path, tmp_path: Path) -> None:
    """An OpenAI-compatible server is the optimizer: the run comes to the same, and its calls are on
    the ledger."""

    def answer(body: dict[str, Any]) -> str:
        assert body["messages"][0] == {"role": "system", "content": "I am optimizer"}
        return rewrite(body["messages"][-1]["content"])

    with Outside(answer) as outside:
        helpers = {
            "backward": {"prompt": "I am backward", "sampling": {"max_tokens": 600}},
            "optimizer": {
                "url": outside.url,
                "base": "big",
                "prompt": "I am optimizer",
                "sampling": {"temperature": 0, "max_tokens": 600},
            },
        }
        summary = trainer(tmp_path / "run", model, helpers=helpers).train()
        assert len(outside.bodies) == 4 and outside.bodies[0]["model"] == "big"
    assert summary["eval"]["after"]["accuracy"] == 1
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 4
    assert summary["state"]["values"].keys() == summary_of(trained)["state"]["values"].keys()


# bad input


def test_a_helper_that_answers_in_another_format_changes_nothing(
    model: Path, tmp_path: Path
) -> None:
    """Fact U6, for a whole step, and for steps on end."""
    say = scripted(optimizer=lambda q: "The improved prompt is: be right.")
    made = trainer(tmp_path / "run", model, say=say, max_steps=2)
    summary = made.train()
    found = feedback_rows(tmp_path / "run")
    assert [row["unreadable"] for row in found] == [1, 1] and made.run.values == {}
    assert not any(row["adopted"] or row["verdicts"] for row in found)
    assert made.feedback.history.updates == [] and summary["steps"] == 2


@pytest.mark.slow
def test_helpers_that_say_nothing_are_counted(model: Path, tmp_path: Path) -> None:
    say = scripted(backward=lambda q: "")
    trainer(tmp_path / "run", model, say=say, max_steps=1).train()
    (row,) = feedback_rows(tmp_path / "run")
    assert row["unanswered"] == 3 and row["feedback"] == {"solver.prompt": 0}
    assert not [e for e in asides(tmp_path / "run") if e.task.id.startswith("optimizer")]


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "adopted"), [("not_worse", False), ("always", True)])
def test_a_value_past_the_context_length(
    gate: str, adopted: bool, model: Path, tmp_path: Path
) -> None:
    """The gate keeps it out, since no task can be played with it: its score of 0 is not worse than
    the start's. Without a gate the next step's feedback is the error, which the helpers see."""
    long = f"<IMPROVED_VARIABLE>{'word ' * 3000}</IMPROVED_VARIABLE>"
    with Outside(lambda body: long) as outside:
        helpers = {**HELPERS, "optimizer": {"url": outside.url, "base": "big"}}
        made = trainer(tmp_path / "run", model, helpers=helpers, gate=gate, max_steps=2)
        made.run.engines.given.context = 8000
        summary = made.train()
    assert bool(made.run.values) == adopted and summary["steps"] == 2
    first, second = made.feedback.history.updates
    if adopted:
        assert feedback_rows(tmp_path / "run")[1]["failed"] == 3
        texts = [e.task.prompt for e in asides(tmp_path / "run", 2)]
        assert sum("do not fit a context of 8000" in text for text in texts) >= 3
        assert summary["eval"]["after"]["failed"] == 12
    else:
        assert "every episode failed" in first["why"]
        assert second["why"].startswith("rejected before: every episode failed")


@pytest.mark.slow
def test_a_value_that_is_too_long_is_refused(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, max_value_length=20, max_steps=1)
    made.train()
    (row,) = feedback_rows(tmp_path / "run")
    assert row["refused"] == 1 and made.run.values == {}


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "adopted"), [("flag", True), ("refuse", False)])
def test_values_that_hold_training_tasks_are_flagged(
    copies: str, adopted: bool, model: Path, tmp_path: Path
) -> None:
    def optimizer(question: str) -> str:
        text = rewrite(question)
        task = question.split("<TASK>\n")[1].split("\n")[0]
        return text.replace("Work it out.", f"Work it out, as in {task} = {copy_of(task)}.")

    def copy_of(task: str) -> int:
        a, sign, b = task.split()
        return OPERATIONS[SIGNS[sign]](int(a), int(b))

    def with_task(question: str) -> str:
        if "<TASK>" not in question:
            task = question.split("<INPUT>\n")[1].split("\n")[0]
            question = f"<TASK>\n{task}\n</TASK>\n{question}"
        return optimizer(question)

    say = scripted(optimizer=with_task)
    made = trainer(tmp_path / "run", model, say=say, copies=copies, max_steps=1)
    made.train()
    (row,) = feedback_rows(tmp_path / "run")
    assert row["copied"] == 1 and bool(made.run.values) == adopted


@pytest.mark.slow
def test_a_task_cannot_forge_a_value(model: Path, tmp_path: Path) -> None:
    """The tasks hold the tags of the optimizer's reply, and the optimizer repeats a task."""
    say = scripted(
        backward=lambda q: q,  # as much as it can repeat
        optimizer=lambda q: (
            "I was shown this:\n"
            + q.partition("Feedback on it")[2].partition("Improve the variable by")[0]
        ),
    )
    made = trainer(
        tmp_path / "run",
        model,
        say=say,
        tasks="tests.trainers.feedback_run:forging",
        helpers={
            name: {"prompt": f"I am {name}", "sampling": {"temperature": 0, "max_tokens": 4000}}
            for name in ("backward", "optimizer")
        },
        engine=ScriptedEngine(say, context=100_000),
        max_steps=1,
    )
    made.train()
    (row,) = feedback_rows(tmp_path / "run")
    assert row["unreadable"] == 1 and made.run.values == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gate": "better"}, "gate: expected one of"),
        ({"num_val_tasks": 0}, "gate: not_worse compares values on validation tasks"),
        ({"params": ["solver.promt"]}, "params: no param 'solver.promt'"),
        ({"prompts": {"chian": "x"}}, "prompts.chian: this method has no such prompt"),
        ({"helpers": {"backward": {}}}, "helpers.optimizer: missing"),
        ({"loss": "judge", "helpers": {"backward": {}, "optimizer": {}}}, "helpers.evaluator"),
        ({"max_staleness": 1}, "max_staleness"),
        (
            {"agents": {"solver": {"policy": "own"}}, "policies": {"own": {"trainable": True}}},
            "trains no",
        ),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        trainer(tmp_path / "run", model, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_prompts_can_be_changed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prompts = {"rewrite": "Write it anew: {value}{feedback}"}
    trainer(folder, model, prompts=prompts, max_steps=1).train()
    (text,) = [e.task.prompt for e in asides(folder) if e.task.id.startswith("optimizer")]
    assert text.startswith("Write it anew: <VARIABLE>")
    wrong = trainer(tmp_path / "wrong", model, prompts={"rewrite": "{valeu}"}, max_steps=1)
    with pytest.raises(SettingError, match=r"prompts.rewrite: unknown field \{valeu\}"):
        wrong.train()
