"""FlowReasoner's system: rounds of programs, what public checks say of them, and that nothing
hidden is read."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from marlora.agents.programs.flowreasoner import FlowReasoner, best_round, parent_shares
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task
from marlora.rollouts.sandbox import sandbox
from tests.conformance import check_system

AGENTS = ["designer", "solver"]
SUMS = Task("t", "3 + 4", "7", meta={"examples": [["1 + 1", "2"], ["2 + 2", "4"]]})
TESTS = ["assert f(2) == 4", "assert f(3) == 9"]
CODE = Task(
    "c",
    "Write f, which squares.",
    meta={"names": ["f"], "tests": TESTS, "_tests": ["assert f(736451907) == 1"]},
)
COUNTS = {"feedback": "{passed}/{total}", "invalid": "invalid", "tag": ""}


def play(
    system: FlowReasoner, task: Task, programs: list[str], solver: Callable[[str], str]
) -> tuple[str, Team]:
    given = iter(programs)

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        return next(given) if agent == "designer" else solver(messages[-1].content)

    team = fake_team(system.specs, answer, execute=sandbox.run, check=sandbox.check)
    return asyncio.run(system.run(task.public(), team)), team


def told(team: Team, name: str) -> list[float]:
    return [r.value for r in team.rewards if r.name == name]


def sums(text: str) -> str:
    """A solver that adds if it is told to, and else names the first number."""
    left, right = text.split("\n")[0].split(" + ")
    return str(int(left) + int(right)) if "Add" in text else left


def test_rounds_go_on_until_every_check_passes_and_the_best_program_answers() -> None:
    output, team = play(
        FlowReasoner(AGENTS, **COUNTS),
        SUMS,
        ['await custom("Say.")', 'await magic("x")', 'await custom("Add.")'],
        sums,
    )
    assert output == "7"
    assert (
        told(team, "val") == [0.0, -1.0, 1.0]
        and told(team, "valid") == [1.0, 0.0, 1.0]
        and told(team, "performance") == [1.0]
    )
    chat = [m.content for m in [t for t in team.turns if t.agent == "designer"][-1].messages]
    assert chat[1:] == ['await custom("Say.")', "0/2", 'await magic("x")', "invalid"]
    assert [t.agent for t in team.turns] == [
        "designer",
        "solver",
        "solver",
        "designer",
        "designer",
        *["solver"] * 3,
    ]


def test_feedback_tells_what_failed_and_whose_words_it_shows() -> None:
    _, team = play(
        FlowReasoner(AGENTS, rounds=2),
        SUMS,
        ['<graph>\nawait custom("Say.")\n</graph>', "none"],
        sums,
    )
    second = [t for t in team.turns if t.agent == "designer"][1]
    assert "passes 0 of 2 checks" in second.messages[-1].content
    assert "To the problem '1 + 1' it answers '1'; right is '2'" in second.messages[-1].content
    assert second.reads == (1,)  # the solver's word; what it said itself stands in its chat
    assert told(team, "performance") == [0.0] and told(team, "val") == [0.0, -1.0]


def test_programs_are_checked_by_public_tests_in_the_sandbox() -> None:
    """FlowReasoner's sheet, fact 6: 1 of 2 is 0.5, 2 of 2 is 1."""
    solver = {"bad": "```python\ndef f(x): return 4\n```", "good": "def f(x): return x * x"}
    programs = ['await custom("bad")', 'await custom("good")']
    output, team = play(
        FlowReasoner(AGENTS, **COUNTS), CODE, programs, lambda text: solver[text.split("\n")[-1]]
    )
    assert output == solver["good"] and told(team, "val") == [0.5, 1.0]
    assert all("736451907" not in m.content for t in team.turns for m in t.messages)


def test_the_best_round_counts_and_the_latest_of_equals() -> None:
    assert (
        best_round([0.5, 1.0, 0.0]) == 1
        and best_round([0.5, 0.0, 0.5]) == 2
        and best_round([math.nan, 0.0]) == 1
    )
    programs = ['await custom("good")', 'await custom("bad")']
    half = "def f(x): return 4"
    system = FlowReasoner(AGENTS, rounds=2, **COUNTS)
    output, team = play(
        system, CODE, programs, lambda text: half if "good" in text else "no program at all"
    )
    assert output == half and told(team, "val") == [0.5, 0.0] and told(team, "performance") == [0.5]


def test_what_a_program_is_worth() -> None:
    program = "\n".join(['a = await custom("Add.")'] * 3 + ["a"])
    _, team = play(
        FlowReasoner(AGENTS, free_nodes=2, max_calls=10, **COUNTS), SUMS, [program], sums
    )
    assert (told(team, "performance"), told(team, "complexity"), told(team, "efficiency")) == (
        [1.0],
        [-0.5],
        [-0.6],
    )
    _, team = play(FlowReasoner(AGENTS, rounds=1, **COUNTS), SUMS, ["def"], sums)
    assert (told(team, "performance"), told(team, "complexity"), told(team, "efficiency")) == (
        [-1.0],
        [0.0],
        [0.0],
    )


def test_a_trajectory_may_be_worth_the_mean_of_its_rounds() -> None:
    programs = ['await custom("Say.")', "def", 'await custom("Add.")']
    _, team = play(FlowReasoner(AGENTS, worth="mean", **COUNTS), SUMS, programs, sums)
    assert told(team, "val") == [0.0, -1.0, 1.0] and told(team, "performance") == [0.0]


def test_several_runs_of_a_program_are_one_score() -> None:
    answers = iter(["2", "0", "0", "4", "7"])
    output, team = play(
        FlowReasoner(AGENTS, rounds=1, runs=2, **COUNTS),
        SUMS,
        ['await custom("?")'],
        lambda text: next(answers),
    )
    assert told(team, "val") == [0.5] and output == "7"


def test_without_anything_to_check_by_there_is_one_round_and_no_score() -> None:
    output, team = play(
        FlowReasoner(AGENTS, **COUNTS), Task("t", "3 + 4"), ['await custom("Add.")'], sums
    )
    assert output == "7" and all(
        math.isnan(v) for v in told(team, "val") + told(team, "performance")
    )


def test_a_drawn_parent_is_shown_and_read() -> None:
    programs = ['await custom("Say.")', 'await custom("Say it.")', 'await custom("Add.")']
    output, team = play(FlowReasoner(AGENTS, parents="drawn", **COUNTS), SUMS, programs, sums)
    designs = [t for t in team.turns if t.agent == "designer"]
    assert output == "7" and all(len(t.messages) == 1 for t in designs)
    assert programs[0] in designs[1].messages[0].content and designs[1].reads[0] == 0
    assert sum(p in designs[2].messages[0].content for p in programs[:2]) == 1


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([1.0, 0.9, 0.5], [0.716533, 0.183439, 0.100028]),
        ([1.0, 0.9, 0.8, 0.5], [0.681745, 0.157114, 0.086113, 0.075028]),
        ([0.4] * 5, [0.2] * 5),
    ],
)
def test_chances_of_parents_by_hand(scores: list[float], shares: list[float]) -> None:
    """FlowReasoner's sheet, fact 1."""
    assert parent_shares(scores) == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"parents": "best"}, "parents"),
        ({"worth": "last"}, "worth"),
        ({"feedback": "{score}"}, "feedback: unknown field"),
        ({"fallback": 'await custom("x")'}, "rounds do their work"),
        ({"attempts": 2}, "rounds do their work"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        FlowReasoner(AGENTS, **settings)


@pytest.mark.parametrize("parents", ["chat", "drawn"])
def test_it_keeps_what_every_system_keeps(parents: str) -> None:
    def answer(agent: str, messages: tuple[Message, ...], marker: str) -> str:
        return (
            f"{marker}\n<graph>\nawait custom('Add {marker}')\n</graph>"
            if agent == "designer"
            else f"{marker} 4"
        )

    check_system(
        FlowReasoner(AGENTS, rounds=2, parents=parents), [SUMS], answer, execute=sandbox.run
    )  # type: ignore[arg-type]
