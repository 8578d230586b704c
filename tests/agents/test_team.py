"""The team: numbers and seeds given before anything is awaited, limits, names."""

from __future__ import annotations

import asyncio

import pytest

from marlora.agents.concurrency import gather
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.seeds import derive_seed
from marlora.agents.system import System
from marlora.agents.testing import fake_team
from marlora.agents.transcript import LimitError
from marlora.agents.types import AgentSpec, SettingError, Task
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
