"""The team: numbers and seeds given before anything is awaited, limits, names."""

from __future__ import annotations

import asyncio
import math

import pytest

from marlora.agents.chat import Services
from marlora.agents.concurrency import gather
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.seeds import derive_seed
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.testing import Fake, fake_team
from marlora.agents.transcript import LimitError, Transcript
from marlora.agents.types import AgentSpec, Decision, SettingError, Task
from tests.agents.teams import run, slow_team

DEBATE = Debate(["a", "b", "c"], rounds=2)
TASK = Task("t", "2+2?")


# --- numbers and seeds


def test_index_is_the_order_of_calls_whatever_the_latency() -> None:
    def indices(waits: list[int]) -> list[tuple[int, str, int | None]]:
        team, _ = slow_team("abc", waits)
        run(lambda: gather(agent.reply("hi") for agent in team))
        return [(turn.index, turn.agent, turn.sampling.seed) for turn in team.turns]

    assert indices([9, 5, 1]) == indices([1, 5, 9])
    assert [(index, agent) for index, agent, _ in indices([9, 5, 1])] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


def test_index_is_taken_before_the_reply_is_awaited() -> None:
    async def play() -> list[int]:
        first, second = team["a"].reply("x"), team["b"].reply("y")
        return [(await second).index, (await first).index]

    team, _ = slow_team("ab", [0, 0])
    assert run(play) == [1, 0]


def test_every_request_has_a_seed_of_its_own() -> None:
    async def seeds(seed: int) -> list[int | None]:
        team = fake_team(["a", "b"], lambda agent, messages: "x", seed=seed)
        for _ in range(20):
            await gather(agent.reply("hi") for agent in team)
        return [turn.sampling.seed for turn in team.turns]

    found = [seed for episode in range(20) for seed in asyncio.run(seeds(episode))]
    assert len(set(found)) == len(found) == 800
    assert asyncio.run(seeds(3)) == found[120:160]
    # Siblings draw with the numbers that follow their request's seed: these must not meet another
    # request's.
    gaps = sorted(found)
    assert min(b - a for a, b in zip(gaps, gaps[1:], strict=False)) > 1000


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    assert (
        derive_seed(0, "solver", 3) == 1720351317042732501
    )  # printf '[0, "solver", 3]' | sha256sum
    assert derive_seed("a", "b") != derive_seed("ab") and 0 <= derive_seed() < 2**62


# --- limits and names


def test_turns_are_limited() -> None:
    async def play() -> None:
        for _ in range(4):
            await team["a"].reply("x")

    team = fake_team(["a"], lambda agent, messages: "y", max_turns=3)
    with pytest.raises(LimitError, match="asked for turn 3; max_turns is 3"):
        run(play)
    assert len(team.turns) == 3


def test_names_of_agents() -> None:
    with pytest.raises(SettingError, match="two agents are named 'a'"):
        Chain(["a", "b", "a"])
    with pytest.raises(SettingError, match="at least one agent"):
        Chain([])
    for one in ("solver", AgentSpec("solver")):
        with pytest.raises(SettingError, match="expected a list of agents, got one"):
            Chain(one)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"agents.promt: unknown field; did you mean 'prompt'\?"):
        Chain([{"name": "a", "promt": "x"}])  # type: ignore[list-item]
    assert Chain([{"name": "a", "prompt": "x"}, "b"]).specs == (
        AgentSpec("a", prompt="x"),
        AgentSpec("b"),
    )  # type: ignore[list-item]
    with pytest.raises(
        SettingError, match=r"team\['solvr'\]: no such agent; did you mean 'solver'\?"
    ):
        fake_team(["solver"], lambda agent, messages: "")["solvr"]


def test_two_agents_may_share_a_policy() -> None:
    team = fake_team(
        [AgentSpec("a", policy="p"), AgentSpec("b", policy="p")], lambda agent, messages: agent
    )
    run(lambda: gather(agent.reply("x") for agent in team))
    assert [(turn.agent, turn.policy, turn.text) for turn in team.turns] == [
        ("a", "p", "a"),
        ("b", "p", "b"),
    ]
    assert len(team) == 2 and [agent.name for agent in team] == ["a", "b"]


def test_values_name_the_policy_that_an_agent_speaks_with() -> None:
    specs = [AgentSpec("a"), AgentSpec("b", policy="p"), AgentSpec("c", policy="q")]
    values = {"a.policy": "base", "b.policy": "a", "c.policy": ""}
    team = fake_team(specs, lambda agent, messages: agent, values)

    async def play() -> None:
        for agent in team:
            await agent.reply("x")
            await agent.fresh().reply("y")
        await team["b"].take_over(team["a"]).reply("z")

    run(play)
    spoke = [(turn.agent, turn.policy) for turn in team.turns]
    assert spoke == [("a", "base")] * 2 + [("b", "a")] * 2 + [("c", "q")] * 2 + [("b", "a")]
    assert [spec.policy for spec in specs] == ["a", "p", "q"], "specs stay as they are"


# --- decisions


def test_logits_are_those_given_else_of_a_table_else_of_the_values() -> None:
    """Each source prefers another option by e^60."""
    options = ["x", "y", "z", "first"]
    values = {"edge": {"x": 60.0}, "edges": {"edge": {"y": 60.0}}, "empty": {}}
    team = fake_team(["a"], lambda agent, messages: "", values)
    assert team.decide("edge", options) == "x"
    assert team.decide("edge", options, table="edges") == "y"
    assert team.decide("edge", options, logits={"z": 60.0}) == "z"
    assert team.decide("edge", options, logits={"z": 60.0}, table="edges") == "z"
    assert [decision.index for decision in team.decisions] == [0, 1, 2, 3]
    for unset in ({"table": "empty"}, {"table": "nowhere"}, {"logits": {}}):
        team.decide("edge", options, **unset)
        assert team.decisions[-1].logprob == pytest.approx(-math.log(4)), unset


def test_a_greedy_team_takes_the_likeliest_of_each_source() -> None:
    spec = [AgentSpec("a")]
    for seed in range(10):
        team = Team(
            spec,
            Services(Fake(lambda agent, messages: "")),
            Transcript(seed),
            {"edge": {"y": 0.01}, "edges": {"edge": {"x": 0.01}}},
            greedy=True,
        )
        found = [
            team.decide("edge", ["x", "y"]),
            team.decide("edge", ["y", "x"], table="edges"),
            team.decide("edge", ["x", "y"], logits={"x": -0.01}),
            team.decide("free", ["x", "y"]),
        ]
        assert found == ["y", "x", "y", "x"]


def test_a_decision_says_what_it_was_made_for() -> None:
    team = fake_team(["a"], lambda agent, messages: "")
    team.decide("model", ["x"], "what is 2+2?")
    team.decide("model", ["x"])
    assert [decision.about for decision in team.decisions] == ["what is 2+2?", ""]
    assert team.decisions[0] == Decision(0, "model", ("x",), "x", 0.0, "what is 2+2?")


# --- gold, children


def test_gold_is_marked() -> None:
    team = fake_team(["a"], lambda agent, messages: "x")
    assert run(lambda: team["a"].reply("the answer is 4", saw_gold=True)).saw_gold
    assert run(lambda: team["a"].reply("and now?")).saw_gold  # it still stands in the chat
    assert not run(lambda: team["a"].fresh().reply("x")).saw_gold


def test_team_rng_follows_the_seed() -> None:
    draws = [
        fake_team(["a"], lambda agent, messages: "", seed=seed).rng.random() for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_children_need_someone_who_plays_them() -> None:
    team = fake_team(["a"], lambda agent, messages: "")
    with pytest.raises(SettingError, match=r"use rollouts\.episodes\.runner\.EpisodeRunner"):
        run(lambda: team.play(DEBATE, [TASK]))


def test_a_system_without_run_says_so() -> None:
    class Empty(System):
        pass

    with pytest.raises(TypeError, match=r"Empty has no run\(task, team\)"):
        run(lambda: Empty(["a"]).run(TASK, fake_team(["a"], lambda agent, messages: "")))
