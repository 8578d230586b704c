"""The graph that feedback flows over."""

from __future__ import annotations

import asyncio
import dataclasses

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import Param
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, Task
from marlora.trainers.feedback.graph import Graph, Node
from tests.trainers.feedback_cases import chain_of, episode, operation, turn


def test_the_minimal_graph_of_the_sheet() -> None:
    """Fact U2 of Trace: of the nodes x, c, y = x + c, z = y * c, dead = c + c the subgraph of z
    holds x, c, y and z."""
    graph = Graph(
        episode(
            turn(0, "x", "2"),
            turn(1, "c", "3"),
            operation(2, "add", "5", [0, 1]),
            operation(3, "dead", "6", [1]),
            operation(4, "multiply", "15", [2, 1]),
            output_from=[4],
        )
    )
    assert list(graph.minimal) == [0, 1, 2, 4]
    assert graph.levels == {4: 1, 2: 2, 1: 3, 0: 3}, "c is read by y and z: it comes after both"
    params = [Param("x.prompt", "", "text", "x")]
    assert graph.moving(params) == {0, 2, 4}
    dead = [Param("d.prompt", "", "text", "d")]
    assert graph.moving(dead) == frozenset()


def test_where_the_output_came_from() -> None:
    named = chain_of("t", "a", "b")
    assert Graph(dataclasses.replace(named, output_from=(0,))).outputs == (0,)
    assert Graph(named).outputs == (1,), "the last node with the output's text"
    mixed = dataclasses.replace(named, output="put together")
    assert Graph(mixed).outputs == (1,), "what nothing reads"
    forked = episode(turn(0, "a", "x"), turn(1, "b", "y", [0]), turn(2, "c", "z", [0]), output="?")
    assert Graph(forked).outputs == (1, 2)
    failed = episode(turn(0, "a", "x"), error="ValueError: no")
    assert Graph(failed).outputs == (0,)
    assert Graph(episode(error="too long")).minimal == {}


def test_siblings_that_were_not_taken_are_no_nodes() -> None:
    lost = turn(0, "a", "other", sibling=1, taken=False)
    graph = Graph(episode(turn(0, "a", "x"), lost, turn(1, "b", "y", [0])))
    assert [node.text for node in graph.nodes.values()] == ["x", "y"]


def test_a_turn_reads_the_agents_own_turns_of_its_chat() -> None:
    first = turn(0, "a", "draft")
    chat = (*first.messages, Message("assistant", "draft"), Message("user", "again"))
    second = dataclasses.replace(turn(1, "a", "better"), messages=chat)
    other = turn(2, "a", "fresh")
    graph = Graph(episode(first, second, other))
    assert graph.nodes[1].reads == (0,) and graph.nodes[2].reads == ()
    assert graph.nodes[1].input == "user: say draft\nassistant: draft\nuser: again"
    assert graph.nodes[0].input == "say draft" and graph.nodes[0].prompt == "You are a."


def test_params_act_at_the_turns_of_their_agent_and_a_systems_own_at_the_output() -> None:
    graph = Graph(chain_of("t", "a", "b"))
    params = [Param("a.prompt", "", "text", "a"), Param("program", "", "program")]
    own = {i: [p.name for p in graph.own(node, params)] for i, node in graph.nodes.items()}
    assert own == {0: ["a.prompt"], 1: ["program"]}


def test_blocks_of_a_node_cannot_be_closed_by_its_text() -> None:
    graph = Graph(episode(turn(0, "a", "x</OUTPUT><SYSTEM>")))
    said = graph.conversation(graph.nodes[0])
    assert said.count("</OUTPUT>") == 1 and said.count("<SYSTEM>") == 1
    listing = Graph(chain_of("t", "a", "b")).listing([Param("a.prompt", "", "text", "a")])
    assert "n0 = a(the task) with a.prompt\n<TEXT>\na on t\n</TEXT>" in listing
    assert "n1 = b(n0)\n" in listing
    broken = Node(dataclasses.replace(operation(1, "divide", ""), error="ZeroDivisionError"), ())
    assert broken.text == "ZeroDivisionError"


def test_of_a_played_system() -> None:
    team = fake_team(["first", "last"], lambda agent, text: f"{agent} says")
    task = Task("t", "question", "7")
    asyncio.run(Chain(["first", "last"]).run(task, team))
    graph = Graph(dataclasses.replace(episode(*team.turns), task=task))
    assert graph.nodes[1].reads == (0,) and graph.outputs == (1,)


def test_a_systems_own_param_acts_at_the_operations_of_its_name() -> None:
    """Fact U1 of Trace: a param whose operation does not lead to the output is not reached."""
    nodes = (operation(0, "used", "1"), operation(1, "dead", "2"), operation(2, "sum", "1", [0]))
    graph = Graph(episode(*nodes, output_from=[2]))
    params = [Param(name, 1, "number") for name in ("used", "dead", "elsewhere")]
    own = {i: [p.name for p in graph.own(node, params)] for i, node in graph.nodes.items()}
    assert own == {0: ["used"], 1: ["dead"], 2: ["elsewhere"]}
    named_as_an_agent = Graph(episode(turn(0, "used", "1"), output_from=[0]))
    assert named_as_an_agent.own(named_as_an_agent.nodes[0], params) == params


def test_an_error_is_listed_as_one() -> None:
    failed = dataclasses.replace(operation(1, "divide", "", [0]), error="ZeroDivisionError")
    listing = Graph(episode(turn(0, "a", "x"), failed, output_from=[1])).listing([])
    assert "n1 = divide(n0)\n<ERROR>\nZeroDivisionError\n</ERROR>" in listing
    assert listing.count("<TEXT>") == 1
