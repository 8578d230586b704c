"""Every shipped system passes the conformance suite, and the suite catches each kind of system that
must not pass."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from marlora.agents.concurrency import gather
from marlora.agents.patterns.actor_critic import ActorCritic
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.patterns.vote import Vote
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import AgentSpec, Message, SettingError, Task
from tests.conformance import check_system

TASKS = [
    Task(
        "sum",
        "What is 7+8+5?",
        answer="the answer is twenty",
        meta={"c": 5, "_tests": "assert add(7, 8, 5) == 20"},
    ),
    Task("capital", "The capital of France, please.", answer="Paris-on-the-Seine", meta={"c": 1}),
]


def judging(agent: str, messages: tuple[Message, ...], marker: str) -> str:
    """A judge that finds the first answer wrong and the second right (it sees which from the
    marker's number)."""
    return (
        f"{marker}\nVerdict: {'right' if int(marker[-3]) > 2 else 'wrong'}"
        if agent == "judge"
        else marker
    )


def calling(agent: str, messages: tuple[Message, ...], marker: str) -> str:
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool_call>'
    return f"{marker} {call}" if "tool_response" not in messages[-1].content else marker


@pytest.mark.parametrize(
    "system",
    [
        Debate(["a", "b", "c"], rounds=3),
        Debate(["a", "b"], rounds=1),
        Chain(["solver"]),
        Chain(["solver", "checker", "writer"]),
        Chain(["first", "last"], views={"last": "{previous}+{c}"}),
        Chain(["x", "y", "z"], views={"z": "{x} and {answer} of {prompt}"}),
        Vote(["a", "b"], samples=3),
    ],
    ids=repr,
)
def test_shipped_systems_conform(system: System) -> None:
    check_system(system, TASKS)


@pytest.mark.parametrize("agents", [["actor", "judge"], ["actor", "judge", "critic"]])
def test_actor_critic_conforms(agents: list[str]) -> None:
    check_system(ActorCritic(agents, max_rounds=3), TASKS, judging)


def test_agents_with_tools_conform() -> None:
    check_system(Debate([AgentSpec("a", tools=("calculator",)), "b"], rounds=2), TASKS, calling)


@dataclass
class Broken(System):
    """Two agents, one reads the other; `fault` says what is done wrong."""

    fault: str = ""

    async def run(self, task: Task, team: Team) -> str:
        a, b = team
        if self.fault == "race":
            order: list[str] = []

            async def ask(name: str) -> None:
                await team[name].reply(task.prompt)
                order.append(name)

            await gather(ask(name) for name in ("a", "b"))
            return order[0]
        if self.fault == "own dice":
            return str(await a.reply(f"{task.prompt} {random.random()}"))
        if self.fault == "silent":
            return task.prompt
        draft = await a.reply(task.prompt)
        other = await b.reply(task.prompt)
        text = f"{task.prompt}\n{draft}" if self.fault != "reads too much" else task.prompt
        if self.fault == "gold":
            text += f" {next(t.answer for t in TASKS if t.id == task.id)}"
        reads = {"reads too little": [], "reads the wrong one": [other], "gold": [draft]}.get(
            self.fault, [draft]
        )
        return str(await b.reply(text, reads=reads))


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("race", "took longer or shorter"),
        ("own dice", "the same seed gave another episode"),
        ("silent", "no agent was asked"),
        ("reads too little", "shown the text of turn 0"),
        ("reads the wrong one", "shown the text of turn 0"),
        ("reads too much", "says it reads turn 0, whose text it is not shown"),
        ("gold", "shown the answer"),
    ],
)
def test_faults_are_found(fault: str, problem: str) -> None:
    check_system(Broken(["a", "b"]), TASKS)
    with pytest.raises(AssertionError, match=problem):
        check_system(Broken(["a", "b"], fault=fault), TASKS)


@dataclass
class Stateful(System):
    seen: list[str] = field(default_factory=list)

    async def run(self, task: Task, team: Team) -> str:
        turn = await next(iter(team)).reply(f"{task.prompt} {len(self.seen)}")
        self.seen.append(task.id)
        return str(turn)


def test_a_system_that_remembers_is_found() -> None:
    with pytest.raises(AssertionError, match="the same seed gave another episode"):
        check_system(Stateful(["a"]), TASKS)


@dataclass
class Children(System):
    leak: bool = False

    async def run(self, task: Task, team: Team) -> str:
        child = Task("child", task.prompt, answer="gold-5309144207" if self.leak else None)
        return "".join(await team.play(Vote(["v"]), [child]))[:0] + str(
            await team["a"].reply(task.prompt)
        )


def test_children_get_no_gold_either() -> None:
    check_system(Children(["a"]), TASKS)
    with pytest.raises(AssertionError, match="child's task holds the gold answer"):
        check_system(Children(["a"], leak=True), TASKS)


def test_the_fake_answer_must_hold_its_marker() -> None:
    with pytest.raises(AssertionError, match="holds the marker"):
        check_system(Chain(["a"]), TASKS, lambda agent, messages, marker: "4")


def test_what_a_system_needs_of_a_task_is_said() -> None:
    with pytest.raises(SettingError, match=r"views.last: unknown field \{d\}"):
        check_system(Chain(["first", "last"], views={"last": "{previous}+{d}"}), TASKS)


@dataclass
class Digest(System):
    """One agent reads what plain Python made of two drafts."""

    fault: str = ""

    async def run(self, task: Task, team: Team) -> object:
        first, second = team["a"], team["b"]
        drafts = [await first.reply(task.prompt), await first.fresh().reply(task.prompt)]
        joined = " / ".join(map(str, drafts))
        joined += str(random.random()) if self.fault == "chance" else ""
        digest = team.record("join", joined, reads=drafts[: 1 if self.fault == "half" else 2])
        reads = [] if self.fault == "unread" else [digest]
        return await second.reply(f"Of {digest}: go on", reads=reads)


def test_text_may_come_through_an_operation_on_record() -> None:
    check_system(Digest(["a", "b"]), TASKS)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unread", "is shown the text of turn 0"),
        ("half", "is shown the text of turn 1"),
        ("chance", "another episode"),
    ],
)
def test_operations_that_are_not_on_record_as_they_are_fail(fault: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_system(Digest(["a", "b"], fault=fault), TASKS)
