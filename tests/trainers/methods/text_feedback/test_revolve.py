"""REVOLVE's runs: what the optimizer sees of the past, and a stall that only the past ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.text.tags import inside
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.text_feedback.revolve import NO_VALUES, RevolveConfig, RevolveTrainer
from marlora.trainers.methods.text_feedback.textgrad import TextGradConfig, TextGradTrainer
from tests.trainers.feedback_run import SIGNS, Cut, dies_in_round, rewrite, scripted, trainer
from tests.trainers.loop.test_state import facts

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD = " ".join(f"{sign} means {name}." for sign, name in SIGNS.items())


def revolve(folder: Path, model: Path, **changes: Any) -> RevolveTrainer:
    made: RevolveTrainer = trainer(
        folder, model, cls=RevolveTrainer, config=RevolveConfig, **changes
    )
    return made


def optimizer_prompts(folder: Path, name: str = "solver.prompt") -> list[str]:
    found = [e for e in Store(folder / "episodes") if e.task.id.startswith(f"optimizer/{name}")]
    return [e.task.prompt for e in sorted(found, key=lambda e: e.step)]


def past(prompt: str) -> str | None:
    return inside(prompt.partition("The new value has to obey")[0], "PAST_ITERATIONS")


def in_turn(*values: str) -> Callable[[str], str]:
    """An optimizer that says these values, one per call."""
    left = list(values)
    return lambda question: f"<IMPROVED_VARIABLE>{left.pop(0)}</IMPROVED_VARIABLE>"


def test_the_optimizer_sees_all_past_values(model: Path, tmp_path: Path) -> None:
    """Facts U1 and U2: first that there are none, then v1, then v1 and v2; the value that the run
    began with is never among them, and the last is the one in force."""
    say = scripted(optimizer=in_turn("v1", "v2", "v3"))
    revolve(tmp_path / "run", model, say=say, max_steps=3).train()
    first, second, third = optimizer_prompts(tmp_path / "run")
    assert NO_VALUES in first and past(first) is None
    assert past(second) == "Iteration 1: v1"
    assert past(third) == "Iteration 1: v1\nIteration 2: v2" and NO_VALUES not in third
    assert inside(third.partition("Feedback on it")[0], "VARIABLE") == "v2"
    assert "Work it out" not in (past(third) or "")


def stalls(question: str) -> str:
    """The same value again, unless the last two past values are equal: then the right one."""
    lines = (past(question) or "").splitlines()
    values = [line.partition(": ")[2] for line in lines]
    good = len(values) > 1 and values[-1] == values[-2]
    return f"<IMPROVED_VARIABLE>{GOOD if good else 'Try hard.'}</IMPROVED_VARIABLE>"


def test_only_the_past_ends_a_stall(model: Path, tmp_path: Path) -> None:
    """The sheet's script: REVOLVE is there at step 3, TextGrad, its control, never."""
    say = scripted(optimizer=stalls)
    made = revolve(tmp_path / "revolve", model, say=say, max_steps=3)
    assert made.train()["eval"]["after"]["accuracy"] == 1
    assert [u["status"] for u in made.feedback.history.updates] == [
        "adopted",
        "unchanged",
        "adopted",
    ]
    other = trainer(
        tmp_path / "textgrad", model, cls=TextGradTrainer, config=TextGradConfig, say=say
    )
    assert other.train()["eval"]["after"]["accuracy"] == 0


@pytest.mark.slow
def test_its_calls_are_textgrads(model: Path, tmp_path: Path) -> None:
    """Fact U5: F 3, B 6, O 1; fact U4 is 12 steps of 3 tasks by default."""
    settings: dict[str, Any] = dict(gate="always", num_val_tasks=0, max_steps=1)
    summary = revolve(tmp_path / "run", model, **settings).train()
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls == {"backward": 6, "optimizer": 1}
    assert summary["ledger"]["train"]["solver"]["calls"] == 3
    defaults = RevolveConfig()
    assert defaults.max_steps * defaults.tasks_per_step == 36


@pytest.mark.slow
def test_two_params_have_their_own_past_and_a_rejected_value_is_marked(
    model: Path, tmp_path: Path
) -> None:
    """Fact U6. Upstream nobody sees that a value was put back."""

    def optimizer(question: str) -> str:
        name = "solver" if "'solver.prompt'" in question.split("Its value")[0] else "last"
        step = len((past(question) or "").splitlines()) + 1
        return f"<IMPROVED_VARIABLE>{name} {step}</IMPROVED_VARIABLE>"

    system = Chain(["solver", "last"])
    agents = {
        name: {"policy": "base", "prompt": f"I am the {name}."} for name in ("solver", "last")
    }
    revolve(
        tmp_path / "run",
        model,
        system=system,
        agents=agents,
        say=scripted(optimizer=optimizer),
        gate="strictly_better",
        max_steps=2,
    ).train()
    for name in ("solver", "last"):
        _, prompt = optimizer_prompts(tmp_path / "run", f"{name}.prompt")
        (line,) = (past(prompt) or "").splitlines()
        assert line.startswith(f"Iteration 1: {name} 1 (rejected: ")
        assert inside(prompt.partition("Feedback on it")[0], "VARIABLE") == f"I am the {name}."


@pytest.mark.slow
@pytest.mark.parametrize("track", ["values", "responses"])
def test_a_window_and_responses(track: str, model: Path, tmp_path: Path) -> None:
    say = scripted(optimizer=in_turn("v1", "v2", "v3"))
    revolve(tmp_path / "run", model, say=say, max_steps=3, window=1, track=track).train()
    *_, third = optimizer_prompts(tmp_path / "run")
    lines = (past(third) or "").splitlines()
    assert lines[0] == "Iteration 2: v2"
    assert lines[1:] == ([] if track == "values" else ["Response before it: 0"] * 3)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("<VARIABLE>plain</VARIABLE>", "plain"),
        ("<VARIABLE>no</VARIABLE><IMPROVED_VARIABLE>yes</IMPROVED_VARIABLE>", "yes"),
        ("no tags", None),
    ],
)
def test_what_is_read_of_a_reply(
    reply: str, value: str | None, model: Path, tmp_path: Path
) -> None:
    """Fact U3; a reply without tags adds nothing to the list either."""
    made = revolve(tmp_path / "run", model, say=scripted(optimizer=lambda q: reply), max_steps=1)
    made.train()
    assert made.run.values == ({} if value is None else {"solver.prompt": value})
    assert len(made.feedback.history.updates) == (value is not None)


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_third_step_knows_the_past(model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    revolve(whole, model).train()
    killed = revolve(cut, model)
    dies_in_round(killed, 9)  # the optimizer of step 3
    with pytest.raises(Cut):
        killed.train()
    revolve(cut, model, resume=True).train()
    assert facts(cut) == facts(whole)
    assert past(optimizer_prompts(cut)[-1])


@pytest.mark.slow
def test_past_values_grow_the_prompt_and_the_budget_bounds_it(model: Path, tmp_path: Path) -> None:
    def optimizer(question: str) -> str:
        return rewrite(question).replace("Work it out.", f"Work it out. {len(question)}")

    say = scripted(optimizer=optimizer)
    revolve(tmp_path / "run", model, say=say, gate="always").train()
    sizes = [len(past(prompt) or "") for prompt in optimizer_prompts(tmp_path / "run")]
    assert sizes == sorted(sizes) and sizes[0] == 0 and len(set(sizes)) == 4
    summary = revolve(tmp_path / "short", model, say=say, budget={"tokens": 8000}).train()
    assert summary["budget"]["spent"]["tokens"] <= 8000 and summary["steps"] < 4
