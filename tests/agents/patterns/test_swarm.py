"""A swarm: which graphs are drawn and how likely, who is shown what, what makes the output."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from marlora.agents.patterns.swarm import Edge, Swarm, closes_cycle, edge_name, layers, reached_from
from marlora.agents.state import check_values
from marlora.agents.system import build_system
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Decision, Message, SettingError, Task
from tests.conformance import check_system

TASK = Task("t", "7+8+5", "20", meta={"c": 5})
SURE = 50.0  # a logit: e^-50 is nothing


def table(system: Swarm, on: Sequence[str]) -> dict[str, Any]:
    """The values with which exactly these edges are drawn."""
    return {
        "edges": {
            name: {"on": SURE if name in on else -SURE}
            for name in map(edge_name, system.possible_edges)
        }
    }


def play(
    system: Swarm,
    on: Sequence[str],
    answers: Mapping[str, str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[str, Team]:
    """Output and team of an episode with these edges; an agent answers what `answers` has, else its
    own name."""
    given = answers or {}
    team = fake_team(
        system.specs,
        lambda agent, messages: given.get(agent, agent),
        table(system, on),
        seed=seed,
        **settings,
    )
    return str(asyncio.run(system.run(TASK.public(), team))), team


def said(team: Team) -> dict[str, str]:
    """What each agent was told, in the order in which they were asked."""
    return {turn.agent: turn.messages[-1].content for turn in team.turns}


def test_an_agent_is_shown_what_its_predecessors_answered() -> None:
    system = Swarm(["a", "b", "c"])
    output, team = play(system, ["a->b", "b->output"], {"a": "19", "b": "so 20"})
    assert output == "20"
    assert said(team) == {
        "a": "7+8+5",
        "b": "7+8+5\n\nOthers answered:\n\n[a] 19\n\nUse what is right in that, correct what is"
        " wrong, and answer the task.",
    }
    assert [(turn.agent, turn.reads) for turn in team.turns] == [("a", ()), ("b", (0,))]


def test_whose_answer_reaches_nobody_is_not_asked() -> None:
    system = Swarm(["a", "b", "c"])
    output, team = play(system, ["a->b", "c->output", "c->a"])
    assert output == "c" and list(said(team)) == ["c"]


def test_predecessors_are_shown_in_the_order_of_the_team() -> None:
    on = ["c->d", "a->d", "b->a", "d->output"]
    for seed in range(5):  # whatever the order in which the edges were decided
        _, team = play(Swarm([*"abcd"]), on, seed=seed)
        assert list(said(team)) == ["b", "c", "a", "d"]
        assert "[a] a\n\n[c] c" in said(team)["d"]
        assert [turn.reads for turn in team.turns] == [(), (), (0,), (1, 2)]


def test_the_majority_of_those_with_an_edge_to_the_output_counts() -> None:
    system = Swarm([*"abcd"])
    answers = {"a": "4", "b": "4.0", "c": "5", "d": "5"}
    on = ["a->output", "b->output", "c->output"]
    assert play(system, on, answers)[0] == "4"
    everyone = [*on, "d->output"]
    outputs = [play(system, everyone, answers, seed)[0] for seed in range(40)]
    assert outputs == [play(system, everyone, answers, seed)[0] for seed in range(40)]
    assert min(Counter(outputs).values()) >= 8 and set(outputs) == {"4", "5"}


def test_a_judge_makes_the_output_of_what_it_is_shown() -> None:
    system = Swarm(["a", "b", "judge"], judge="judge")
    assert system.nodes == ("a", "b") and len(system.possible_edges) == 4
    output, team = play(system, ["b->output"], {"judge": "I say 20."})
    assert output == "I say 20." and team.turns[-1].reads == (0,)
    assert said(team)["judge"].startswith("7+8+5\n\nOthers answered:\n\n[b] b\n\n")


def test_views_and_what_is_heard_are_templates() -> None:
    views = {"a": "A{prompt}", "b": "{prompt} and {c}"}
    system = Swarm(["a", "b"], views=views, heard="{task}|{others}")
    _, team = play(system, ["a->b", "b->output"], {"a": "{task}"})
    assert said(team) == {"a": "A7+8+5", "b": "7+8+5 and 5|[a] {task}"}
    deaf = Swarm(["a", "b"], views=views, heard="{task}")  # others are not quoted, so not read
    _, team = play(deaf, ["a->b", "b->output"])
    assert said(team) == {"b": "7+8+5 and 5"}  # nobody would read a
    assert {decision.name for decision in team.decisions} >= {"a->b", "b->output"}
    with pytest.raises(SettingError, match=r"views.a: unknown field \{d\} for task 't'"):
        play(Swarm(["a"], views={"a": "{d}"}), ["a->output"])


def test_fixed_edges_are_never_decided_and_never_lost() -> None:
    """GPTSwarm's option for edges inside an agent drops them: the list is made anew after it."""
    system = Swarm(["a", "b", "c"], fixed=["a->b", "b->output"])
    assert len(system.possible_edges) == 9 - 2
    output, team = play(system, [])
    assert output == "b" and list(said(team)) == ["a", "b"]
    assert {"a->b", "b->output"}.isdisjoint(decision.name for decision in team.decisions)
    assert "b->a" not in [decision.name for decision in team.decisions]  # would close a cycle


# graphs


def graph(edges: Sequence[Edge]) -> str:
    return " ".join(sorted(edge_name(edge) for edge in edges))


def draw(system: Swarm, seed: int, values: Mapping[str, Any] | None = None) -> list[Edge]:
    return system.decide(fake_team(system.specs, lambda agent, messages: "", values, seed=seed))


def distribution(system: Swarm, values: Mapping[str, Any], seed: int = 0) -> dict[str, float]:
    """Every graph that can be drawn in the order that this seed gives, and its log-probability: the
    sum over recorded decisions."""
    found: dict[str, float] = {}
    open_: list[tuple[Decision, ...]] = [()]
    while open_:
        given = open_.pop()
        team = fake_team(system.specs, lambda a, m: "", values, seed=seed, decisions=given)
        edges = system.decide(team)
        drawn = tuple(team.decisions)
        found[graph(edges)] = sum(decision.logprob for decision in drawn)
        for n in range(len(given), len(drawn)):  # the other choice at each one that was free
            last = drawn[n]
            other = next(option for option in last.options if option != last.choice)
            # a replay computes log-probabilities anew
            open_.append((*drawn[:n], Decision(n, last.name, last.options, other, math.nan)))
    return found


def test_of_a_pair_in_fixed_order_the_first_is_twice_as_frequent() -> None:
    """Fact 6 of the sheet: A->B .5, B->A .25, none .25."""
    system = Swarm(["A", "B"], order="fixed", fixed=["A->output", "B->output"])
    found = distribution(system, {})
    assert found == {
        "A->B A->output B->output": pytest.approx(-0.693147, abs=1e-6),
        "A->output B->A B->output": pytest.approx(-1.386294, abs=1e-6),
        "A->output B->output": pytest.approx(-1.386294, abs=1e-6),
    }


def test_in_random_order_neither_of_a_pair_comes_first() -> None:
    system = Swarm(["A", "B"], fixed=["A->output", "B->output"])
    counts = Counter(graph(draw(system, seed)) for seed in range(4000))
    shares = {name: count / 4000 for name, count in counts.items()}
    assert shares == {
        "A->B A->output B->output": pytest.approx(0.375, abs=0.03),
        "A->output B->A B->output": pytest.approx(0.375, abs=0.03),
        "A->output B->output": pytest.approx(0.25, abs=0.03),
    }


def test_four_n_squared_edges_are_possible() -> None:
    """Fact 6: N truthful and N adversarial agents of one node."""
    for count in (1, 2, 3):
        names = [f"{kind}{n}" for kind in "ta" for n in range(count)]
        assert len(Swarm(names).possible_edges) == 4 * count**2
    first = Swarm(["a", "b"]).possible_edges
    assert [edge_name(e) for e in first] == ["a->b", "b->a", "a->output", "b->output"]


def test_the_log_probability_of_a_graph() -> None:
    """Fact 1: P (.1, .5); graphs (1, 0) and (0, 1)."""
    assert math.log(0.1 / 0.9) == pytest.approx(-2.197225, abs=1e-6)
    system = Swarm([*"abc"], order="fixed", fixed=["c->output", "a->b", "b->c", "a->c"])
    edges = {"a->output": {"on": -2.197225}, "b->output": {}}
    found = distribution(system, {"edges": edges})
    assert found["a->b a->c a->output b->c c->output"] == pytest.approx(-2.995732, abs=1e-6)
    assert found["a->b a->c b->c b->output c->output"] == pytest.approx(-0.798508, abs=1e-6)
    assert len(found) == 4


@pytest.mark.parametrize("order", ["fixed", "random"])
def test_the_graphs_of_three_agents_are_acyclic_and_their_chances_sum_to_one(order: str) -> None:
    rng = random.Random(order)
    system = Swarm(["a", "b", "c"], order=order)
    values = {"edges": {edge_name(e): {"on": rng.gauss(0, 1)} for e in system.possible_edges}}
    found = distribution(system, values, seed=3)
    assert sum(map(math.exp, found.values())) == pytest.approx(1.0)
    # labelled acyclic graphs of three nodes, times the edges to the output, of which one is there
    assert len(found) == 25 * (8 - 1)


def test_no_graph_has_a_cycle_and_skipped_edges_have_no_decision() -> None:
    system = Swarm([*"abcdef"])
    for seed in range(50):
        team = fake_team(system.specs, lambda agent, messages: "", seed=seed)
        edges = system.decide(team)
        assert not any(source in reached_from(target, edges) for source, target in edges)
        decided = {decision.name for decision in team.decisions}
        skipped = [e for e in system.possible_edges if edge_name(e) not in decided]
        taken = {edge for edge in skipped if edge in edges}  # the only one to the output
        assert skipped and all(closes_cycle(edge, edges) for edge in {*skipped} - taken)
        on = [d.name for d in team.decisions if d.choice == "on"]
        assert {edge_name(e) for e in edges} == {*on, *map(edge_name, taken)}


def test_the_output_always_hears_somebody() -> None:
    """GPTSwarm draws graphs without an edge to the output, and from P = .1 its threshold begins and
    may end with one."""
    system, never = Swarm(["a", "b"]), {"on": -SURE}
    values = {"edges": {edge_name(edge): never for edge in system.possible_edges}}
    drawn = Counter(graph(draw(system, seed, values)) for seed in range(200))
    assert min(drawn["a->output"], drawn["b->output"]) > 70 and len(drawn) == 2
    team = fake_team(["a", "b"], lambda agent, messages: "", values, seed=0)
    (_, target), names = system.decide(team)[-1], [d.name for d in team.decisions]
    assert target == "output" and len(names) == 3  # nothing was to be decided of that edge
    rare = {"a->output": -1.0, "b->output": -3.0, "a->b": -1.0, "b->a": -1.0}
    for order in ("random", "fixed"):  # a greedy team keeps the likeliest
        assert greedy(Swarm(["a", "b"], order=order), rare) == {"a->output"}
        assert greedy(Swarm(["a", "b"], order=order), dict.fromkeys(rare, -1.0)) == {"a->output"}


def test_a_cycle_is_looked_for_in_linear_time() -> None:
    """GPTSwarm's check forgets what it has visited: in a dense graph every path is walked."""
    nodes = [str(n) for n in range(60)]
    dense = list(itertools.combinations(nodes, 2))
    assert not closes_cycle(("0", "59"), dense) and closes_cycle(("59", "0"), dense)


def test_layers() -> None:
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "output"), ("e", "a")]
    assert layers(edges, [*"abcdef"]) == [["e"], ["a"], ["b", "c"], ["d"]]
    assert layers([("a", "b")], ["a", "b"]) == []


# greedy


def greedy(system: Swarm, logits: Mapping[str, float]) -> set[str]:
    values = {"edges": {name: {"on": logit} for name, logit in logits.items()}}
    team = Team(system.specs, fake_team(["x"], lambda a, m: "").services, None, values, greedy=True)
    return set(map(edge_name, system.decide(team)))


def test_a_greedy_team_takes_edges_more_likely_than_not_the_likeliest_first() -> None:
    system, logits = Swarm(["a", "b"]), {"a->b": 0.2, "b->a": 0.9, "a->output": -0.1}
    assert greedy(system, {**logits, "b->output": 0.1}) == {"b->a", "b->output"}
    in_order = Swarm(["a", "b"], order="fixed")
    assert greedy(in_order, {**logits, "b->output": 0.1}) == {"a->b", "b->output"}


def test_before_anything_is_learnt_a_greedy_team_is_the_whole_graph() -> None:
    """GPTSwarm's threshold, P > 1/2, makes it the empty one: a `before` that nothing can be worse
    than."""
    assert greedy(Swarm(["a", "b", "c"]), {}) == {
        "a->b",
        "a->c",
        "b->c",
        "a->output",
        "b->output",
        "c->output",
    }


# settings


def test_the_logits_of_edges_are_a_param() -> None:
    system = Swarm(["a", "b"], fixed=["a->b"])
    params = {param.name: param for param in system.params()}
    assert params["edges"].kind == "logits" and params["edges"].value == {}
    assert params["edges"].options == ("b->a", "a->output", "b->output")
    assert "a.prompt" in params
    check_values(system.params(), {"edges": {"b->a": {"on": 0.5, "off": 0}}})
    for value, problem in (
        ({"a->b": {"on": 0.5}}, "no logits of 'a->b'; did you mean"),
        ({"a->output": {"maybe": 0.5}}, "a->output: expected logits of 'on' and 'off', got"),
        ({"a->output": 0.5}, "a->output: expected logits of 'on' and 'off', got 0.5"),
        ({"a->output": {"on": "much"}}, "expected a number"),
    ):
        with pytest.raises(SettingError, match=f"values.edges: .*{problem}"):
            check_values(system.params(), {"edges": value})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"agents": ["a", "output"]}, "agents: 'output' is a swarm's last node"),
        ({"judge": "c"}, "judge: 'c' is no agent"),
        ({"agents": ["a"], "judge": "a"}, "agents: expected others besides the judge 'a'"),
        ({"fixed": ["a->c"]}, "fixed: 'a->c' is no edge of this swarm; expected AGENT->AGENT or"),
        ({"fixed": ["output->a"]}, "fixed: 'output->a' is no edge of this swarm"),
        ({"fixed": ["a"]}, "fixed: 'a' is no edge of this swarm"),
        ({"fixed": ["a->a"]}, "fixed: 'a->a' closes a cycle"),
        ({"fixed": ["a->b", "b->a"]}, "fixed: 'b->a' closes a cycle of fixed edges"),
        ({"order": "any"}, "order: expected one of"),
        ({"views": {"c": "{prompt}"}}, "views.c: no such agent"),
        ({"views": {"a": "{prompt"}}, r"views.a: unpaired '\{'"),
        (
            {"heard": "{task}", "judge": "b"},
            r"heard: without {others} the judge 'b' sees no answer",
        ),
        ({"heard": "{other}"}, r"heard: unknown field \{other\}; did you mean 'others'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Swarm(**{"agents": ["a", "b"], **settings})


def test_settings_rebuild_a_system() -> None:
    agents = [AgentSpec("a", prompt="Answer."), AgentSpec("b"), AgentSpec("j")]
    system = Swarm(agents, fixed=["a->output"], judge="j", views={"b": "{prompt}!"}, order="fixed")
    arguments = json.loads(json.dumps(system.arguments()))
    assert Swarm(agents=system.agents, **arguments) == system
    named = {"class": "marlora.agents.patterns.swarm:Swarm", "agents": ["a", "b"]}
    assert build_system(named) == Swarm(["a", "b"])


@pytest.mark.parametrize("judge", ["", "f"])
def test_what_training_relies_on(judge: str) -> None:
    check_system(Swarm([*"abcdef"], judge=judge), [TASK], seeds=range(4))
    check_system(Swarm([*"abc"], heard="{task}", fixed=["a->output"]), [TASK], seeds=range(4))


def test_replay_takes_the_recorded_decisions_again() -> None:
    system = Swarm([*"abcd"])

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        return agent

    first = fake_team(system.specs, answer, seed=5)
    output = asyncio.run(system.run(TASK.public(), first))
    values = {"edges": {edge_name(e): {"on": 3.0} for e in system.possible_edges}}
    again = fake_team(
        system.specs, answer, values, seed=5, given=first.turns, decisions=first.decisions
    )
    assert asyncio.run(system.run(TASK.public(), again)) == output
    assert [d.choice for d in again.decisions] == [d.choice for d in first.decisions]
