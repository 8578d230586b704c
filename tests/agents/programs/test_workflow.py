"""Workflows: what programs may be, what operators say to executors, and what becomes of programs
that misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from marlora.agents.programs.operators import OPERATORS
from marlora.agents.programs.restrictions import Restrictions, nodes, program_of, similarity, whole
from marlora.agents.programs.workflow import Workflow
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task
from marlora.rollouts.sandbox.sandbox import check
from marlora.rollouts.sandbox.sandbox import run as execute
from tests.conformance import check_system

TASK = Task("t", "3 + 4", meta={"names": ["f"], "tests": ["assert f(1) == 2"], "setup": "one = 1"})
AGENTS = ["designer", "solver", "judge"]


def play(
    system: Workflow, program: str, answers: list[str] | Callable[..., str] = (), task: Task = TASK
) -> tuple[str, Team]:  # type: ignore[assignment]
    """Output and team; the designer writes this program, executors answer in the order they are
    asked."""
    given = iter([] if callable(answers) else answers)

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        if agent == "designer":
            return f"Let me think.\n<graph>\n{program}\n</graph>"
        return answers(agent, messages) if callable(answers) else next(given)

    team = fake_team(system.specs, answer, execute=execute, check=check)
    return asyncio.run(system.run(task.public(), team)), team


def told(team: Team, name: str) -> list[tuple[float, str]]:
    return [(r.value, r.text) for r in team.rewards if r.name == name]


def test_a_program_asks_its_executors_and_its_last_line_is_the_answer() -> None:
    program = (
        'draft = await custom("Add.")\nwhy = await review(draft)\nawait revise(solution=draft,'
        " feedback=why)"
    )
    output, team = play(
        Workflow(AGENTS, executors={"review": "judge"}), program, ["8", "It is 7.", "7"]
    )
    assert output == "7"
    assert [(t.agent, t.reads) for t in team.turns] == [
        ("designer", ()),
        ("solver", (0,)),
        ("judge", (1,)),
        ("solver", (1, 2)),
    ]
    assert team.turns[1].messages == (Message("user", "3 + 4\n\nAdd."),)
    assert "A solution:\n\n8" in team.turns[2].messages[0].content
    assert told(team, "valid") == [(1.0, "")] and told(team, "ran") == [(1.0, "")]
    first = team.rewards[0]
    assert (first.agent, first.turn, first.sibling, first.source) == ("designer", 0, 0, "workflow")


def test_calls_of_one_round_are_asked_together_and_numbered_in_the_programs_order() -> None:
    program = (
        'import asyncio\na, b = await asyncio.gather(custom("one"), custom("two"))\nawait'
        " ensemble([a, b])"
    )
    output, team = play(
        Workflow(AGENTS),
        program,
        lambda agent, m: "B" if "Several" in m[-1].content else m[-1].content[-3:],
    )
    assert output == "two"
    assert [t.messages[0].content[-3:] for t in team.turns[1:3]] == ["one", "two"]
    assert team.turns[3].reads == (1, 2)


def test_an_entry_may_return_early() -> None:
    program = (
        "async def workflow():\n for n in range(3):\n  got = await custom(f'try {n}')\n  if got =="
        " 'yes':\n   return n"
    )
    assert play(Workflow(AGENTS), program, ["no", "yes"])[0] == "1"
    assert whole(program, "p").endswith("\nawait workflow()") and whole("1", "it's").startswith(
        'problem = "it\'s"\n'
    )


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("", "missing"),
        ("await magic('x')", "name: 'magic'"),
        ("await custom(open('/etc/passwd').read())", "name: 'open'"),
        ("await custom(problem.__class__)", "name: '__class__'"),
        ("custom = 1\nawait review('x')", "name: 'custom' is given"),
        ("await custom('x'", "syntax"),
        ("7", "nodes: it calls 0"),
        ("await custom('x')\n" * 21, "nodes: it calls 21"),
        ("x = await custom('x')", "answer"),
        ("await custom('int(')", "banned"),
        ("await custom('" + "x" * 9000 + "')", "length"),
        ("(" * 5000 + ")" * 5000, "length"),
        ("(" * 3000 + ")" * 3000, "syntax"),
        ("custom('x')", "answer: an operator was called without await"),
        ("import socket\nawait custom('x')", "error: ModuleNotFoundError"),
        ("import os\nawait custom(str(os.environ))", "error: RuntimeError"),
        ("while True:\n    pass\nawait custom('x')", "time"),
        ("await custom(7, 8)", "error: ValueError: custom: too many positional arguments"),
        ("await ensemble('abc')", "error: ValueError: ensemble: solutions: expected a list"),
        ("raise ValueError(await custom('x'))\n1", "error: ValueError"),
        ("while True:\n    await custom('x')\n1", "calls"),
        ("await custom('x') * 10**9", "memory"),
    ],
)
def test_what_is_no_program_costs_its_episode_only(program: str, kind: str) -> None:
    system = Workflow(AGENTS, banned=["int("], seconds=0.5)
    output, team = play(system, program)
    assert output == "" and [t.agent for t in team.turns] == ["designer"]
    ((value, why),) = told(team, "valid")
    assert value == 0.0 and why.startswith(kind), why
    assert told(team, "ran") == []


@pytest.mark.parametrize(
    ("program", "answers", "kind"),
    [
        (
            "while (await custom('more?')) == 'x':\n    pass\n1",
            ["x"] * 99,
            "calls: asked its executors more than 5 times",
        ),
        (
            "r = await custom('go')\nfor n in range(70 if r == '2' else 1):\n    programmer(r)\n1",
            ["2"],
            "calls: episode asked for turn",
        ),
        ("r = await custom('go')\n'x' * (1 if r == '1' else 10**6)", ["2"], "output"),
        ("r = await custom('go')\nNone if r == '2' else r", ["2"], "answer: None"),
        (
            "r = await custom('go')\nawait custom(r * 1000)",
            ["x" * 100],
            "error: ValueError: custom: instruction: a text of",
        ),
        ("await ensemble(['1', '2'])", ["neither"], "error: ValueError: ensemble: nobody chose"),
    ],
)
def test_what_goes_wrong_in_a_run_is_told_and_gives_no_answer(
    program: str, answers: list[str], kind: str
) -> None:
    output, team = play(
        Workflow(AGENTS, max_calls=5 if len(answers) > 1 else 50, max_text=2000), program, answers
    )
    assert output == "" and told(team, "valid") == [(1.0, "")]
    ((value, why),) = told(team, "ran")
    assert value == 0.0 and why.startswith(kind), why


def test_an_invalid_program_may_be_replaced_and_stays_flagged() -> None:
    output, team = play(
        Workflow(AGENTS, fallback='await custom("Solve it.")'), "await magic()", ["7"]
    )
    assert output == "7" and team.turns[1].reads == ()  # no designer wrote this
    assert told(team, "valid")[0][0] == 0.0 and told(team, "ran") == []


def test_a_designer_may_try_again_and_only_the_last_program_is_taken() -> None:
    system, written = (
        Workflow(AGENTS, attempts=3),
        iter(["no program", "<graph>await magic()</graph>", "<graph>await custom('x')</graph>"]),
    )
    team = fake_team(
        system.specs,
        lambda agent, m: next(written) if agent == "designer" else "7",
        execute=execute,
    )
    assert asyncio.run(system.run(TASK.public(), team)) == "7"
    assert [(t.agent, t.taken) for t in team.turns] == [
        ("designer", False),
        ("designer", False),
        ("designer", True),
        ("solver", True),
    ]
    assert [value for value, _ in told(team, "valid")] == [0.0, 0.0, 1.0]
    assert team.turns[1].messages == team.turns[0].messages and team.turns[3].reads == (2,)


def test_a_programmers_program_runs_in_the_sandbox_and_is_mended() -> None:
    output, team = play(
        Workflow(AGENTS),
        "await programmer('Add them.')",
        ["```python\nprint(1/0)\n```", "print(3 + 4)"],
    )
    assert output == "7"
    assert "ZeroDivisionError" in team.turns[2].messages[0].content and team.turns[2].reads == (
        0,
        1,
    )
    output, team = play(Workflow(AGENTS), "await programmer()", ["1/0"] * 3)
    assert output == "" and told(team, "ran")[0][1].startswith(
        "error: ValueError: programmer: no program ran"
    )


def test_solutions_are_mended_until_they_pass_the_public_tests() -> None:
    right = "def f(x):\n    return x + one"
    output, team = play(
        Workflow(AGENTS),
        "await test(await custom('Write f.'))",
        ["def f(x):\n    return x", "raise SystemExit(0)", right],
    )
    assert output == right
    prompts = [t.messages[0].content for t in team.turns[2:]]
    assert "assert f(1) == 2\nAssertionError" in prompts[0] and "SystemExit: 0" in prompts[1]
    assert [t.reads for t in team.turns[2:]] == [(1,), (2,)]
    assert [t.index for t in team.turns] == [0, 1, 2, 3]


FORGED = {  # for `assert f(1) == 2`; none of them is right
    "the word in the checker's frame": (
        "import os, sys\nat = sys._getframe()\nwhile at:\n    for word in at.f_code.co_consts:\n   "
        "     if isinstance(word, str) and word[:7] == 'passed ' and word[7:]:\n           "
        " print(word, flush=True)\n            os._exit(0)\n    at = at.f_back\ndef f(x): return 0"
    ),
    "names of the frames": (
        "import sys\ndef f(x):\n    at = sys._getframe()\n    while at:\n        for name in"
        " list(at.f_locals):\n            at.f_locals[name] = ''\n        at = at.f_back\n   "
        " return 0"
    ),
    "printed": "print('passed 1')\nprint('ok')\ndef f(x): print('passed'); return 0",
    "the end of the process": "import os\nos._exit(0)",
    "the end in the test": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "a number equal to all": (
        "class All(int):\n    def __eq__(self, other): return True\n    __hash__ ="
        " int.__hash__\ndef f(x): return All(0)"
    ),
    "an object equal to all": (
        "class All:\n    def __eq__(self, other): return True\ndef f(x): return All()"
    ),
    "builtins": (
        "import builtins\nbuiltins.AssertionError = type(None)\nfor name in ('exec', 'compile',"
        " 'print', 'isinstance'):\n    setattr(builtins, name, lambda *a, **k: True)\ndef f(x):"
        " return 0"
    ),
    "a verdict to every descriptor": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'["", ""]\\n\' * 3)\n    except'
        " OSError: pass\ndef f(x): return 0"
    ),
    "the test in a text": "def f(x): return 0\n'''",
}


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_no_program_forges_the_public_tests_of_an_operator(program: str) -> None:
    output, team = play(
        Workflow(AGENTS),
        "await test(await custom('Write f.'))",
        [program, "def f(x): return x + 1"],
    )
    assert output == "def f(x): return x + 1"  # the first was found wrong, and mended
    (shown,) = [t.messages[0].content for t in team.turns[2:]]
    assert "It fails a test:\n\nassert f(1) == 2\n" in shown


def test_public_tests_without_the_functions_they_call_are_refused_by_name() -> None:
    task = Task("t", "3 + 4", meta={"tests": ["assert f(1) == 2"]})
    with pytest.raises(
        SettingError, match=r"task 't': meta\.names: expected a list of the functions"
    ):
        play(Workflow(AGENTS), "await test(await custom('Write f.'))", ["def f(x): return 0"], task)


def mending(agent: str, messages: tuple[Message, ...], marker: str) -> str:
    if agent == "designer":
        return f"{marker}\n<graph>\nawait test(await custom('{marker}'))\n</graph>"
    right = "It fails a test" in messages[-1].content
    return f"# {marker}\ndef f(x):\n    return x + {int(right)}"


def test_workflows_with_tests_conform() -> None:
    tasks = [dataclasses.replace(TASK, answer="seven-and-no-other")]
    check_system(Workflow(AGENTS), tasks, mending, seeds=[0], execute=execute, check=check)


def test_similarity_to_the_template_and_complexity() -> None:
    rules = Restrictions(("custom",), template='await custom("a")', max_similarity=0.75)
    assert rules.fault('await custom("b")').startswith("copy: 0.94")
    assert rules.fault("x = [await custom(str(n)) for n in range(3)]\nmax(x, key=x.count)") == ""
    assert similarity("a b ", "a b") == 1.0
    assert (
        nodes('a = await custom("1")\nfor n in range(5):\n    a = await custom(a)\na', ["custom"])
        == 2
    )


def test_where_a_program_stands_in_a_reply() -> None:
    assert program_of("<graph>a</graph> then <graph>\n```python\nb\n```\n</graph>", "graph") == "b"
    assert program_of("a", "graph") is None and program_of("<graph>\n</graph>", "graph") is None
    assert program_of("words\n```\nb\n```", "") == "b" and program_of("b", "") == "b"


def test_a_program_is_kept_from_the_answer() -> None:
    seen: list[str] = []

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        seen.append(messages[-1].content)
        return "<graph>await custom(problem)</graph>" if agent == "designer" else "7"

    system, task = (
        Workflow(AGENTS),
        Task("t", "3 + 4", "seven-and-no-other", meta={"_tests": ["assert hidden"]}),
    )
    asyncio.run(system.run(task.public(), fake_team(system.specs, answer, execute=execute)))
    assert len(seen) == 2 and not any("seven" in text or "hidden" in text for text in seen)


def conforming(agent: str, messages: tuple[Message, ...], marker: str) -> str:
    """A designer whose words reach the executors, two of which answer at once."""
    if agent == "designer":
        return (
            "<graph>\nimport asyncio\n"
            f"a, b = await asyncio.gather(custom('{marker} one'), custom('{marker} two'))\n"
            "c = await ensemble([a, b])\nawait revise(c, await review(b))\n</graph>"
        )
    return f"{marker}\nB" if "Several solutions" in messages[-1].content else marker


def test_workflows_conform() -> None:
    tasks = [Task("t", "3 + 4", "seven-and-no-other", meta={"_tests": ["assert add(3, 4) == 7"]})]
    check_system(
        Workflow(AGENTS, executors={"review": "judge"}), tasks, conforming, execute=execute
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"agents": ["designer"]}, "at least one executor"),
        ({"designer": "nobody"}, "nobody"),
        ({"executors": {"custom": "designer"}}, "executors.custom: 'designer' is no executor"),
        ({"executors": {"magic": "solver"}}, "'magic' is no operator"),
        ({"operators": ["magic"]}, "operator 'magic'"),
        ({"prompts": {"custom": "{nothing}"}}, "prompts.custom: unknown field"),
        ({"instruction": "{answer}"}, "instruction: unknown field"),
        ({"fallback": "await magic()"}, "fallback: no valid program"),
        ({"attempts": 0}, "attempts"),
        ({"max_similarity": 0.0}, "max_similarity"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        Workflow(**{"agents": AGENTS, **settings})


def test_the_designer_is_told_what_it_may_call() -> None:
    text = Workflow(AGENTS, operators=["custom", "ensemble"]).instructed(TASK)
    assert (
        "- await ensemble(solutions: list[str]) -> str: The best of several" in text
        and "revise" not in text
    )
    assert "3 + 4" in text and "await custom(" in text
    assert set(OPERATORS) == {
        "custom",
        "ensemble",
        "review",
        "revise",
        "programmer",
        "test",
        "answer_generate",
    }
