"""Rollouts on the scripted engine: what a system sees, what failures become, seeds, children,
replay, concurrency."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.seeds import derive_seed
from marlora.agents.state import TeamState
from marlora.agents.system import System, override_agents
from marlora.agents.team import Team
from marlora.agents.transcript import Call, Operation, Output
from marlora.agents.types import AgentSpec, Completion, Sampling, SettingError, Task, Usage
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import (
    EpisodeLimits,
    EpisodeRequest,
    EpisodeRunner,
    episode_requests,
)
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.rewards.builtin import exact
from marlora.rollouts.types import Episode

TASK = Task("t1", "2+2?", "gold-4", "sums", "train", {"level": 1, "_steps": "hidden-22"})
OTHER = Task("t2", "3+3?", "gold-6", "sums", "train")


def echo(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """An answer that follows from all that was asked, so that another prompt or seed shows."""
    return f"{ref.policy} {derive_seed(prompt, sampling.seed, k) % 10_000}"


def play_with(
    system: System, engine: ScriptedEngine, rewards: Sequence[Any] = (), **settings: Any
) -> EpisodeRunner:
    found = {
        agent.policy: EngineCompleter(engine, engine.tokens, agent.policy) for agent in system.specs
    }
    return EpisodeRunner(system, found, rewards, **settings)


def one(
    system: System,
    task: Task = TASK,
    rewards: Sequence[Any] = (),
    answer: Any = echo,
    **settings: Any,
) -> Episode:
    """The episode of one task."""
    engine = ScriptedEngine(answer, context=settings.pop("context", 4096))
    return asyncio.run(
        play_with(system, engine, rewards, **settings).play(EpisodeRequest(task, f"g/{task.id}"))
    )


async def gathered(rollouts: EpisodeRunner, plan: Sequence[EpisodeRequest]) -> list[Episode]:
    return [episode async for episode in rollouts.collect(plan)]


@dataclass
class Calls(System):
    """A system that is a function given by the test."""

    body: Callable[[Task, Team], Any] | None = None

    async def run(self, task: Task, team: Team) -> Any:
        assert self.body is not None
        return await self.body(task, team)


# what is seen


def test_a_system_sees_the_public_task_and_rewards_see_all_of_it() -> None:
    seen: list[Task] = []

    async def body(task: Task, team: Team) -> str:
        seen.append(task)
        return str(await team["a"].reply(task.prompt))

    def reward(task: Task, episode: Episode) -> float:
        return float(
            task.answer == "gold-4" and task.meta["_steps"] == "hidden-22" and episode.task == task
        )

    episode = one(Calls(["a"], body), rewards=[reward])
    assert seen == [Task("t1", "2+2?", None, "sums", "train", {"level": 1})]
    assert episode.reward("reward") == 1.0
    told = str([turn.messages for turn in episode.turns])
    assert "2+2?" in told and "gold" not in told and "hidden" not in told


def test_an_episode_says_what_it_is() -> None:
    state = TeamState({}, {"a.prompt": "be brief"})
    episode = one(Chain(["a", "b"]), seed=7, state=state)
    assert (episode.id, episode.group, episode.split, episode.parent) == (
        "g/t1/0",
        "g/t1",
        "train",
        None,
    )
    assert (episode.seed, episode.stop_reason, episode.error) == (
        derive_seed(7, "g/t1/0"),
        "done",
        None,
    )
    assert episode.state == state and episode.turns[0].messages[0].content == "be brief"
    assert (episode.kind, episode.follows) == ("train", "")
    assert [turn.agent for turn in episode.turns] == ["a", "b"] and episode.output == episode.turns[
        1
    ].text


def test_usage_counts_each_agent_by_itself() -> None:
    async def body(task: Task, team: Team) -> str:
        await team["a"].reply("one")
        await team["a"].reply("two", n=3)
        return str(await team["b"].reply("x"))

    episode = one(Calls(["a", "b", "silent"], body))
    for agent, calls in (("a", 2), ("b", 1)):
        own = [turn for turn in episode.turns if turn.agent == agent]
        assert episode.usage[agent].calls == calls
        assert episode.usage[agent].sampled_tokens == sum(len(turn.token_ids) for turn in own) > 0
        sent = sum(len(turn.prompt_ids) for turn in own if turn.sibling == 0)
        assert episode.usage[agent].prompt_tokens == sent > 0
        assert episode.usage[agent].seconds > 0
    assert episode.usage["silent"] == Usage()


def test_a_request_counts_once_however_many_answers_it_has() -> None:
    """`hello` is 5 tokens of the scripted engine and its frame; each answer is `2` and an end."""

    async def body(task: Task, team: Team) -> str:
        return str(await team["a"].reply("hello", n=3))

    alone = one(Chain(["a"]), replace(TASK, prompt="hello"), answer=lambda *asked: "2")
    episode = one(Calls(["a"], body), answer=lambda *asked: "2")
    lone, three = alone.usage["a"], episode.usage["a"]
    assert [turn.sibling for turn in episode.turns] == [0, 1, 2]
    assert (lone.calls, three.calls) == (1, 1)
    assert three.prompt_tokens == lone.prompt_tokens == len(episode.turns[0].prompt_ids)
    assert three.sampled_tokens == 3 * lone.sampled_tokens == 3 * 2


# state


def test_an_episode_keeps_the_state_of_its_call() -> None:
    own, given = TeamState({}, {"a.prompt": "own"}), TeamState({}, {"a.prompt": "given"})

    async def go() -> list[str]:
        rollouts = play_with(Chain(["a"]), ScriptedEngine(echo), state=own)
        first = await rollouts.play(EpisodeRequest(TASK, "x"))
        second = await rollouts.play(EpisodeRequest(TASK, "y"), given)
        assert (first.state, second.state) == (own, given)
        states = iter([own, given])
        plan = episode_requests([TASK, OTHER], label="z")
        drawn = [e async for e in rollouts.collect(plan, lambda: next(states))]
        return [str(e.state.values["a.prompt"]) for e in (first, second, *drawn)]

    assert asyncio.run(go()) == ["own", "given", "own", "given"]


@dataclass
class Told:
    """Answers with the policy and version that it is asked as."""

    policy: str
    outside = False

    def most_prompt_tokens(self, call: Call) -> int:
        return 0

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        return [Completion("x", policy=self.policy, version=version)] * call.n


def test_a_state_names_the_versions_of_the_policies_that_speak() -> None:
    """Also those that only the values name; others would make two keys of one team."""
    found: Mapping[str, Any] = {policy: Told(policy) for policy in ("a", "b", "spare")}
    versions = {"spare": "spare-v1", "b": "b-v1", "a": "a-v1"}
    for values, kept in (
        ({}, {"a": "a-v1", "b": "b-v1"}),
        ({"b.policy": "spare"}, {"a": "a-v1", "spare": "spare-v1"}),
        ({"b.policy": "a"}, {"a": "a-v1"}),
    ):
        runner = EpisodeRunner(Chain(["a", "b"]), found, state=TeamState(versions, values))
        episode = asyncio.run(runner.play(EpisodeRequest(TASK, "x")))
        assert episode.state == TeamState(kept, values)
        spoke = [values.get(f"{agent}.policy", agent) for agent in "ab"]
        assert [turn.policy for turn in episode.turns] == spoke
        assert [turn.version for turn in episode.turns] == [versions[p] for p in spoke]
        assert [turn.agent for turn in episode.turns] == ["a", "b"]


def test_a_state_whose_policy_is_not_served_is_refused() -> None:
    engine = ScriptedEngine(echo)
    told = "agent 'a': its policy 'spar' is not served; did you mean 'spare'"
    found = {p: EngineCompleter(engine, engine.tokens, p) for p in ("a", "spare")}
    with pytest.raises(SettingError, match=told):
        EpisodeRunner(Chain(["a"]), found, state=TeamState({}, {"a.policy": "spar"}))
    runner = EpisodeRunner(Chain(["a"]), found)
    with pytest.raises(SettingError, match=told):
        asyncio.run(runner.play(EpisodeRequest(TASK, "x"), TeamState({}, {"a.policy": "spar"})))


# what the output was made of


def test_the_output_names_the_turns_and_operations_it_came_from() -> None:
    async def turn(task: Task, team: Team) -> Any:
        await team["a"].reply("draft")
        return await team["a"].reply("final")

    async def text(task: Task, team: Team) -> Any:
        return str(await team["a"].reply("draft"))

    async def operation(task: Task, team: Team) -> Any:
        drafts = [await team["a"].fresh().reply(f"draft {k}") for k in range(2)]
        return team.record("join", " ".join(map(str, drafts)), reads=drafts)

    async def output(task: Task, team: Team) -> Any:
        drafts = [await team["a"].fresh().reply(f"draft {k}") for k in range(3)]
        return Output("best", (drafts[2], drafts[0]))

    expected: dict[Any, tuple[int, ...]] = {turn: (1,), text: (), operation: (2,), output: (2, 0)}
    for body, made_of in expected.items():
        episode = one(Calls(["a"], body))
        assert (episode.error, episode.output_from) == (None, made_of), body.__name__
    joined = one(Calls(["a"], operation))
    assert joined.operations == (Operation(2, "join", (0, 1), joined.output or ""),)
    assert joined.output == " ".join(turn.text for turn in joined.turns)


def test_an_episode_without_an_output_came_from_nothing() -> None:
    async def body(task: Task, team: Team) -> str:
        await team["a"].reply("hello")
        raise KeyError("lost")

    episode = one(Calls(["a"], body))
    assert (episode.output, episode.output_from) == (None, ())
    zero = one(Calls(["a"], body), limits=EpisodeLimits(on_error="zero"))
    assert (zero.output, zero.output_from) == ("", ())


def test_kind_and_follows_are_the_requests_and_children_share_the_kind() -> None:
    async def body(task: Task, team: Team) -> str:
        children = await team.play(Chain(["a"]), [task])
        return str(children[0].output)

    async def go(request: EpisodeRequest) -> list[Episode]:
        return await gathered(play_with(Calls(["a"], body), ScriptedEngine(echo)), [request])

    for kind in ("train", "trial", "aside", "eval"):
        child, parent = asyncio.run(go(EpisodeRequest(TASK, "x", kind=kind, follows="seen/0")))
        assert (parent.kind, parent.follows, child.kind) == (kind, "seen/0", kind)
        assert child.parent == parent.id and child.state == parent.state


def test_greedy_teams_decide_greedily() -> None:
    async def body(task: Task, team: Team) -> str:
        await team["a"].reply("x")
        return team.decide("edge", ["x", "y"])

    async def go(greedy: bool) -> list[str | None]:
        state = TeamState({}, {"edge": {"x": 0.0, "y": 0.1}})
        runner = play_with(Calls(["a"], body), ScriptedEngine(echo), state=state)
        plan = episode_requests([TASK], label="x", num_generations=20)
        played = await gathered(runner.greedy() if greedy else runner, plan)
        share = math.exp(0.1) / (1 + math.exp(0.1))
        for episode in played:
            p = share if episode.output == "y" else 1 - share
            assert episode.decisions[0].logprob == pytest.approx(math.log(p))
        return [episode.output for episode in played]

    assert asyncio.run(go(True)) == ["y"] * 20
    assert set(asyncio.run(go(False))) == {"x", "y"}


# failures are data


def test_a_system_that_raises_is_an_episode_with_the_turns_so_far() -> None:
    async def body(task: Task, team: Team) -> str:
        await team["a"].reply("hello")
        return str([][3])

    episode = one(Calls(["a"], body), rewards=[lambda task, episode: 1.0])
    assert episode.stop_reason == "error" and episode.output is None and episode.rewards == ()
    assert episode.error is not None and episode.error.startswith(
        "IndexError: list index out of range (test_runner.py:"
    )
    assert len(episode.turns) == 1 and math.isnan(episode.reward())


def test_a_reward_that_raises_or_gives_nan_makes_the_episode_unscorable() -> None:
    def broken(task: Task, episode: Episode) -> float:
        raise KeyError("no such column")

    def nan(task: Task, episode: Episode) -> float:
        return math.nan

    episode = one(Chain(["a"]), rewards=[broken, nan, lambda task, episode: 1.0])
    assert episode.error is None and episode.output is not None
    assert (
        math.isnan(episode.reward("broken"))
        and math.isnan(episode.reward("nan"))
        and math.isnan(episode.reward())
    )
    assert episode.rewards[0].text == "reward 'broken' failed: KeyError: 'no such column'"
    assert episode.rewards[1].text == "reward 'nan' gave nan" and episode.rewards[2].value == 1.0


def test_a_prompt_that_does_not_fit_is_counted() -> None:
    episode = one(Chain(["a"]), Task("long", "x" * 100), context=64)
    assert episode.stop_reason == "context" and episode.output is None and episode.turns == ()
    assert episode.error is not None and "do not fit a context of 64" in episode.error


def test_time_and_turns_are_limited() -> None:
    async def slow(task: Task, team: Team) -> str:
        await asyncio.sleep(60)
        return ""

    async def endless(task: Task, team: Team) -> str:
        while True:
            await team["a"].reply("again")

    late = one(Calls(["a"], slow), limits=EpisodeLimits(episode_timeout=0.05))
    assert late.stop_reason == "timeout" and late.error == "not done after 0.05 s (episode_timeout)"
    long = one(Calls(["a"], endless), limits=EpisodeLimits(max_turns=3))
    assert long.stop_reason == "limit" and len(long.turns) == 3


def test_an_async_reward_that_never_comes_leaves_the_episode_unscorable() -> None:
    async def judge(task: Task, episode: Episode) -> float:
        await asyncio.sleep(60)
        return 1.0

    episode = one(Chain(["a"]), rewards=[judge, exact], limits=EpisodeLimits(reward_timeout=0.05))
    silent, other = episode.rewards
    assert (
        math.isnan(silent.value)
        and silent.text == "reward 'judge' failed: not there after 0.05 s (reward_timeout)"
    )
    assert episode.error is None and (other.name, other.value) == ("exact", 0.0)


def test_a_timeout_of_the_systems_own_is_an_error_of_the_system() -> None:
    async def body(task: Task, team: Team) -> str:
        raise TimeoutError("the shop did not answer")

    episode = one(Calls(["a"], body))
    assert episode.stop_reason == "error" and "the shop did not answer" in str(episode.error)


def test_an_empty_completion_is_a_turn_and_an_answer() -> None:
    episode = one(
        Chain(["a", "b"]),
        answer=lambda *asked: "",
        rewards=[lambda t, e: float(e.output == t.answer)],
    )
    assert episode.error is None and episode.output == ""
    assert [turn.text for turn in episode.turns] == ["", ""]
    assert [len(turn.token_ids) for turn in episode.turns] == [1, 1]  # the end token was sampled
    assert episode.reward() == 0.0


def test_an_agent_without_a_speaker_is_refused_before_anything_is_played() -> None:
    engine = ScriptedEngine(echo)
    system = Chain([AgentSpec("solver", policy="solvr")])
    with pytest.raises(
        SettingError,
        match=("agent 'solver': its policy 'solvr' is not served; did you mean 'solver'"),
    ):
        EpisodeRunner(system, {"solver": EngineCompleter(engine, engine.tokens, "solver")})


# many at once


def test_an_engine_that_is_gone_ends_collect_after_all_that_was_finished() -> None:
    async def body(task: Task, team: Team) -> str:
        return str(await team["a"].reply(task.id))

    async def go() -> tuple[list[str], list[int]]:
        # calls 0 to 3 begin at once; 1 fails, 0 and 2 end in the same turn of the loop, 3 hangs, 4
        # and 5 wait for room
        engine = ScriptedEngine(
            echo,
            faults={1: Fault("raise", error=EngineError("the engine died")), 3: Fault("stall")},
        )
        rollouts = play_with(Calls(["a"], body), engine, limits=EpisodeLimits(concurrency=4))
        ended: list[str] = []
        with pytest.raises(EngineError, match="the engine died"):
            async for episode in rollouts.collect(
                episode_requests([TASK], label="x", num_generations=6)
            ):
                ended.append(episode.id)
        return ended, [len(engine.calls), len(asyncio.all_tasks())]

    ended, (calls, alive) = asyncio.run(go())
    assert ended[:2] == ["x/t1/0", "x/t1/2"] and not {"x/t1/1", "x/t1/3", "x/t1/5"} & set(ended)
    assert calls <= 6 and alive == 1  # nothing plays on but this test


def test_closing_the_iterator_cancels_what_is_open() -> None:
    cancelled: list[str] = []

    async def body(task: Task, team: Team) -> str:
        if task.id == "t1":
            return "quick"
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(task.id)
            raise
        return "never"

    async def go() -> int:
        stream = play_with(Calls(["a"], body), ScriptedEngine(echo)).collect(
            episode_requests([TASK, OTHER], label="x")
        )
        assert (await anext(stream)).output == "quick"
        await stream.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(go()) == 1 and cancelled == ["t2"]


def test_an_episode_that_was_yielded_is_not_kept() -> None:
    """A plan may be as long as a store; what has been stored need not stay in memory."""

    async def collected() -> list[int]:
        engine = ScriptedEngine(echo)
        rollouts = play_with(Chain(["a"]), engine, limits=EpisodeLimits(concurrency=2))
        plan = episode_requests([Task(str(k), f"{k}?") for k in range(20)], label="many")
        yielded: list[weakref.ref[Episode]] = []
        alive = []
        async for episode in rollouts.collect(plan):
            yielded.append(weakref.ref(episode))
            del episode
            gc.collect()
            alive.append(sum(each() is not None for each in yielded))
        assert len(yielded) == 20
        return alive

    # the iterator holds the one it gave last
    assert max(asyncio.run(collected())) <= 2


def test_concurrency_is_bounded() -> None:
    open_now, most = 0, 0

    async def body(task: Task, team: Team) -> str:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        for _ in range(5):
            await asyncio.sleep(0)
        open_now -= 1
        return ""

    rollouts = play_with(
        Calls(["a"], body), ScriptedEngine(echo), limits=EpisodeLimits(concurrency=3)
    )
    episodes = asyncio.run(
        gathered(rollouts, episode_requests([TASK], label="x", num_generations=10))
    )
    assert len(episodes) == 10 and most == 3


# seeds


def facts(episode: Episode) -> Any:
    """All of an episode but the seconds it took."""
    return replace(
        episode, usage={agent: replace(used, seconds=0.0) for agent, used in episode.usage.items()}
    )


def test_seeds_follow_from_the_jobs_id_and_not_from_its_company() -> None:
    async def go(plan: Sequence[EpisodeRequest], **settings: Any) -> dict[str, Episode]:
        # answers take longer or shorter from call to call: no order is promised
        engine = ScriptedEngine(echo, latency=lambda number: 0.001 * (number % 3))
        rollouts = play_with(Debate(["a", "b"], rounds=2), engine, seed=3, **settings)
        return {episode.id: facts(episode) for episode in await gathered(rollouts, plan)}

    plan = episode_requests([TASK, OTHER], label="x", num_generations=4)
    together = asyncio.run(go(plan))
    assert asyncio.run(go(list(reversed(plan)), limits=EpisodeLimits(concurrency=2))) == together
    assert asyncio.run(go(plan[5:6])) == {plan[5].id: together[plan[5].id]}
    seeds = [turn.sampling.seed for episode in together.values() for turn in episode.turns]
    assert len(seeds) == 8 * 4 and len(set(seeds)) == len(seeds)  # every request has its own
    first = together["x/t1/0"].turns
    assert [turn.sampling.seed for turn in first[:2]] == [
        derive_seed(derive_seed(3, "x/t1/0"), agent, index) for index, agent in enumerate("ab")
    ]


# children


def test_children_of_team_play_are_kept_with_their_parent() -> None:
    async def body(task: Task, team: Team) -> str:
        children = await team.play(Chain(["a", "b"]), [task, replace(task, id="t9", prompt="9?")])
        again = await team.play(Chain(["a"]), [task])
        return "|".join(str(child.output) for child in [*children, *again])

    async def go() -> list[Episode]:
        system = Calls(["a", "b"], body)
        return await gathered(
            play_with(system, ScriptedEngine(echo), [lambda t, e: 0.5]),
            episode_requests([TASK], label="x"),
        )

    *children, parent = asyncio.run(go())
    assert parent.id == "x/t1/0" and parent.parent is None and parent.turns == ()
    assert [child.parent for child in children] == ["x/t1/0"] * 3
    assert parent.output == "|".join(str(child.output) for child in children)
    assert (
        len({child.id for child in children}) == 3 and len({child.seed for child in children}) == 3
    )
    assert [len(child.turns) for child in children] == [2, 2, 1]
    assert all(child.task.answer is None for child in children)  # the parent had none to give
    assert all(child.reward() == 0.5 for child in children)


def test_a_child_whose_engine_is_gone_ends_the_run_and_its_siblings() -> None:
    async def body(task: Task, team: Team) -> str:
        return str(await team.play(Chain(["a"]), [task, OTHER]))

    async def go() -> int:
        engine = ScriptedEngine(echo, faults={0: Fault("raise"), 1: Fault("stall")})
        with pytest.raises(EngineError, match="scripted fault"):
            await play_with(Calls(["a"], body), engine).play(EpisodeRequest(TASK, "x"))
        return len(asyncio.all_tasks())

    assert asyncio.run(go()) == 1


# replay


def test_a_stored_episode_is_replayed_from_its_turns_or_from_its_seed(tmp_path: Path) -> None:
    async def body(task: Task, team: Team) -> str:
        pick = team.decide("who", ["a", "b"])
        drafts = [
            await team[pick].reply(task.prompt, n=3, choose=lambda turns: team.rng.randrange(3))
        ]
        drafts.append(
            await team["b" if pick == "a" else "a"].reply(f"see {drafts[0]}", reads=drafts)
        )
        return f"{drafts[-1]} by {pick}"

    async def go() -> None:
        engine = ScriptedEngine(echo)
        rollouts = play_with(
            Calls(["a", "b"], body), engine, [lambda t, e: float(len(e.turns))], seed=5
        )
        job = EpisodeRequest(TASK, "x/t1", 2, step=4)
        first = await rollouts.play(job)
        with Store(tmp_path) as store:
            store.append(first)
        (stored,) = Store(tmp_path).read()
        assert stored == first
        asked = len(engine.calls)
        replayed = await rollouts.play(
            job, given=stored.turns, decisions=stored.decisions, seed=stored.seed
        )
        assert len(engine.calls) == asked  # nobody was asked
        assert replayed.turns == first.turns and replayed.decisions == first.decisions
        assert (replayed.output, replayed.rewards) == (first.output, first.rewards)
        assert facts(await rollouts.play(job, seed=stored.seed)) == facts(
            first
        )  # the requests' seeds are the same again
        assert len(engine.calls) == asked + 2
        changed = await rollouts.play(
            job, given=stored.turns[:3], replace={0: Completion("other")}, seed=stored.seed
        )
        assert (
            changed.turns[0].text == "other"
            and changed.turns[0].source == "written"
            and changed.turns[-1] != first.turns[-1]
        )

    asyncio.run(go())


def test_greedy_changes_the_temperature_of_every_agent_and_keeps_lengths() -> None:
    own = AgentSpec("a", sampling=Sampling(temperature=0.7, top_p=0.9, max_tokens=9, stop=("!",)))
    rollouts = play_with(
        Chain([own, "b"]), ScriptedEngine(echo), sampling=Sampling(max_tokens=5)
    ).greedy()
    episode = asyncio.run(rollouts.play(EpisodeRequest(TASK, "x")))
    sent = [replace(turn.sampling, seed=None) for turn in episode.turns]
    assert sent == [
        Sampling(temperature=0.0, max_tokens=9, stop=("!",)),
        Sampling(temperature=0.0, max_tokens=5),
    ]


# settings of agents


def test_agents_are_changed_by_name() -> None:
    system = Chain(
        [AgentSpec("a", "first"), AgentSpec("b", sampling=Sampling(top_p=0.5, max_tokens=7))]
    )
    run = Sampling(temperature=0.9, max_tokens=5)
    changes: Mapping[str, Any] = {
        "a": {"prompt": "p", "sampling": {"temperature": 0}},
        "b": {"sampling": {"temperature": 0.1}},
    }
    a, b = override_agents(system, changes, run)
    assert a == AgentSpec(
        "a", "first", "p", sampling=Sampling(temperature=0.0, max_tokens=5)
    )  # the rest is the run's
    assert b.sampling == Sampling(temperature=0.1, top_p=0.5, max_tokens=7)  # the rest is its own


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"solvr": {}}, "agents.solvr: no such agent in Chain; did you mean 'solver'?"),
        ({"solver": {"promt": "x"}}, "agents.solver.promt: unknown field; did you mean 'prompt'?"),
        ({"solver": {"prompt": 5}}, "agents.solver.prompt: expected str, got 5"),
        (
            {"solver": "be brief"},
            "agents.solver: expected a mapping of fields to change, got 'be brief'",
        ),
        (
            {"solver": {"name": "x"}},
            "agents.solver.name: the system names its agents, and this one 'solver'; got 'x'",
        ),
        (
            {"solver": {"sampling": {"temprature": 0}}},
            "agents.solver.sampling.temprature: unknown field; did you mean 'temperature'",
        ),
    ],
)
def test_wrong_changes_of_agents_are_told(changes: Any, told: str) -> None:
    with pytest.raises(SettingError) as caught:
        override_agents(Chain(["solver"]), changes)
    assert told in str(caught.value)
