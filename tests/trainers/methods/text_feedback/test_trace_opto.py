"""Trace's runs: params of all kinds by one call, exceptions as feedback, and programs that stay in
the sandbox; what all methods have to do stands in `test_learning.py` and `test_alike.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.execution import Limits
from marlora.agents.patterns.extraction import Extraction
from marlora.agents.programs.workflow import answer_of, failed
from marlora.agents.state import Param
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.transcript import Output
from marlora.agents.types import Task
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.text_feedback.trace_opto import TraceConfig, TraceTrainer
from tests.trainers.feedback_run import run_of, trainer
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROOM = "tests.trainers.methods.text_feedback.test_trace_opto"
BROKEN, GOOD = "def scale(y):\n    return y / 0", "def scale(y):\n    return y * 3"
ENDLESS = "def scale(y):\n    while True:\n        pass"


@dataclass
class Machine(System):
    """z = scale(y), y = x + 3 or x - 3: a number, a flag, a choice and a program, and a number that
    nothing reads (the toy of the sheet)."""

    scale: str = BROKEN

    def params(self) -> tuple[Param, ...]:
        return (
            Param("x", 2, "number"),
            Param("minus", True, "flag"),
            Param("unit", "none", "choice", options=("none", "apples")),
            Param("scale", self.scale, "program", role="source with the function scale(y)"),
            Param("dead", 9, "number"),
        )

    async def run(self, task: Task, team: Team) -> Output:
        value = {param.name: team.values.get(param.name, param.value) for param in self.params()}
        team.record("dead", str(value["dead"]))
        x = team.record("x", str(value["x"]))
        y = team.record("minus", str(value["x"] + (-3 if value["minus"] else 3)), reads=[x])
        source = f"{value['scale']}\nscale({y.text})"
        outcome = await team.execute(source, {}, Limits(seconds=0.3))
        z = team.record("scale", answer_of(outcome), reads=[y], error=failed(outcome))
        unit = "" if value["unit"] == "none" else f" {value['unit']}"
        end = team.record("unit", z.text + unit, reads=[z])
        return Output(end.text, [end])


def machines(split: str, seed: int = 0, **_: Any) -> list[Task]:
    return [Task(f"{split}{n}", f"make it 24 ({split} {n})", "24", split=split) for n in range(4)]


def trace(folder: Path, model: Path, replies: list[Any], **changes: Any) -> Any:
    """A run whose optimizer gives these replies in turn: suggestions, or whole replies."""
    left = [r if isinstance(r, str) else json.dumps({"suggestion": r}) for r in replies]
    settings: dict[str, Any] = dict(
        system=Machine(["unused"]),
        tasks=f"{ROOM}:machines",
        params=["x", "minus", "unit", "scale", "dead"],
        rewards=["exact"],
        gate="always",
        num_val_tasks=0,
        tasks_per_step=1,
        max_steps=len(left),
        agents={"unused": {"policy": "base"}},
    )
    return trainer(
        folder,
        model,
        cls=TraceTrainer,
        config=TraceConfig,
        say=lambda prompt, ref, sampling, k: f"<SUGGESTION>{left.pop(0)}</SUGGESTION>",
        **{**settings, **changes},
    )


def questions(folder: Path) -> list[str]:
    asked = [e for e in Store(folder / "episodes") if e.kind == "aside"]
    return [e.task.prompt for e in sorted(asked, key=lambda e: (e.step, e.task.id))]


def feedback_rows(folder: Path) -> list[dict[str, Any]]:
    return [row["text_feedback"] for row in rows(folder)]


def test_params_of_all_kinds_are_rewritten_by_one_call(model: Path, tmp_path: Path) -> None:
    """Facts U1, U2 and U4: "5" is the number 5 and "False" the flag false (upstream: true); the
    exception is feedback and is repaired in the same call; the number that no path leads from is
    not shown and keeps its value, though the reply names it."""
    suggestion = {"x": "5", "minus": "False", "scale": GOOD, "dead": 1}
    made = trace(tmp_path / "run", model, [suggestion])
    summary = made.train()
    assert made.run.values == {"x": 5, "minus": False, "scale": GOOD}
    assert type(made.run.values["x"]) is int
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 1
    assert [summary["eval"][when]["accuracy"] for when in ("before", "after")] == [0, 1]
    (text,) = questions(tmp_path / "run")
    assert "Operation 'scale' failed: error: ZeroDivisionError: division by zero" in text
    assert "n3 = scale(n2) with scale\n<ERROR>\nerror: ZeroDivisionError" in text
    assert "n2 = minus(n1) with minus" in text and "dead" not in text
    assert "<TASK>\nmake it 24 (train " in text and "The expected output is: 24" in text


def test_a_program_that_never_ends_is_feedback_and_the_next_step_repairs_it(
    model: Path, tmp_path: Path
) -> None:
    made = trace(tmp_path / "run", model, [{"scale": ENDLESS}, {"scale": GOOD, "x": 11}])
    summary = made.train()
    first, second = questions(tmp_path / "run")
    assert "ZeroDivisionError" in first and "Operation 'scale' failed: time: " in second
    assert "while True:" in second and summary["eval"]["after"]["accuracy"] == 1


@pytest.mark.slow
def test_programs_run_in_the_sandbox_alone(model: Path, tmp_path: Path) -> None:
    """A proposed program that wants the file system and the process of the run gets neither."""
    marker = tmp_path / "MARKER"
    evil = f"def scale(y):\n    open({str(marker)!r}, 'w').write('x')\n    return 24"
    made = trace(tmp_path / "run", model, [{"scale": evil}])
    summary = made.train()
    assert made.run.values["scale"] == evil and not marker.exists()
    assert summary["eval"]["after"]["accuracy"] == 0


def test_replies_that_cannot_be_read_change_nothing(model: Path, tmp_path: Path) -> None:
    """Invalid JSON, values that params do not take; fact U3: TERMINATE in the reasoning stops
    nothing, a suggestion that is missing does. One call a step whatever happens."""
    replies = [
        '{"suggestion": {"x": 5',
        {"x": "a lot", "minus": "maybe", "unit": "pears"},
        '{"reasoning": "all is well: TERMINATE"}',
        '{"reasoning": "do not TERMINATE", "suggestion": {"minus": "false"}}',
    ]
    made = trace(tmp_path / "run", model, replies)
    summary = made.train()
    assert made.run.values == {"minus": False}
    found = feedback_rows(tmp_path / "run")
    assert [row["unreadable"] for row in found] == [1, 0, 0, 0]
    assert [row["refused"] for row in found] == [0, 3, 0, 0]
    assert [row["adopted"] for row in found] == [False, False, False, True]
    assert summary["ledger"]["aside"]["optimizer"]["calls"] == 4
    assert "one of none, apples" in questions(tmp_path / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_memory_holds_the_last_values_with_their_feedback(
    size: int, model: Path, tmp_path: Path
) -> None:
    """First in, first out; without a memory (the default) nothing is shown."""
    replies = [{"x": x, "scale": f"{GOOD} + {x}"} for x in (4, 5, 6)]
    trace(tmp_path / "run", model, replies, memory_size=size).train()
    pasts = [
        text.partition("Earlier values")[2].partition("The new values have")[0]
        for text in questions(tmp_path / "run")
    ]
    # x: 2, then 4, then 5; what was said of each
    assert [past.count("<VALUE>") for past in pasts] == [0, 2 * min(size, 1), 2 * min(size, 2)]
    if size:
        assert "x:\n<VALUE>\n2\n</VALUE>" in pasts[1] and "ZeroDivisionError" in pasts[1]
        assert ("<VALUE>\n2\n" in pasts[2]) == (size == 2) and "<VALUE>\n4\n" in pasts[2]


def test_of_several_candidates_the_first_that_passes_is_taken(model: Path, tmp_path: Path) -> None:
    """Fact U6: temperatures fall from 1.3 to 0. Upstream the last candidate is taken."""
    right = {"minus": False, "x": 5, "scale": GOOD}
    replies: list[Any] = [{"scale": "def scale(y):\n    return 0"}, right, {}]
    made = trace(
        tmp_path / "run",
        model,
        replies,
        num_proposals=3,
        gate="strictly_better",
        num_val_tasks=2,
        max_steps=1,
    )
    assert made.train()["eval"]["after"]["accuracy"] == 1
    asked = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "aside"]
    temperatures = sorted(e.turns[0].sampling.temperature for e in asked)
    assert temperatures == [0.65, 1.3], "the third is not asked for"
    assert [u["status"] for u in made.feedback.history.updates] == ["rejected", "adopted"]


def test_right_answers_cost_no_call(model: Path, tmp_path: Path) -> None:
    """Their BIG-Bench Hard loop takes a step only where the answer is wrong."""
    values = {"minus": False, "x": 5, "scale": GOOD}
    made = trace(tmp_path / "run", model, [{}], values=values, skip_above=0.9)
    summary = made.train()
    assert "aside" not in summary["ledger"] and summary["steps"] == 1
    assert feedback_rows(tmp_path / "run")[0]["feedback"]["scale"] == 0


@pytest.mark.slow
def test_a_prompt_and_the_program_that_reads_the_reply_are_learnt_together(
    model: Path, tmp_path: Path
) -> None:
    """The sheet's example: a team whose prompt is right needs the program as well, and the report
    shows both as diffs. Fact U5: a text with "def" in it is a text."""
    prompt = "Use the default signs: @ means plus. # means times. % means twice-plus."
    program = "def extract(reply):\n    return reply.split()[-1]"
    reply = json.dumps({"suggestion": {"solver.prompt": prompt, "extract": program}})

    def say(text: str, *_: Any) -> str:
        from tests.trainers.feedback_run import CHAT, solve

        (_, system), (_, user) = CHAT.findall(text)[:2]
        if system.startswith("I am optimizer"):
            return f"<SUGGESTION>{reply}</SUGGESTION>"
        return f"It comes to\n{solve(system, user)} in all, that is {solve(system, user)}"

    made = run_of(
        "trace_opto",
        tmp_path / "run",
        model,
        system=Extraction(["solver"], extract="def extract(reply):\n    return reply[:5]"),
        agents={"solver": {"policy": "base", "prompt": "Work it out."}},
        params=["solver.prompt", "template", "extract"],
        rewards=["exact"],
        say=say,
        max_steps=1,
    )
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    assert made.run.values == {"solver.prompt": prompt, "extract": program}
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<b>extract</b>" in report and "solver.prompt, template, extract: " in report
