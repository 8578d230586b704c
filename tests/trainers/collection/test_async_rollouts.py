"""Rollouts ahead of the trainer: nothing learnt from is ever too old, nothing is lost or counted
twice, and S = 0 is the synchronous run."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import TeamState
from marlora.agents.transcript import Call
from marlora.agents.types import Completion, SettingError, Task, Turn
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeLimits, EpisodeRunner
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.collection.async_rollouts import AsyncCollector, CollectedStep, by_length
from marlora.trainers.collection.background import BackgroundLoop
from marlora.trainers.collection.rollout_manager import RolloutManager
from marlora.trainers.collection.stored_episodes import find_stored, training_requests
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.monitoring.run_log import RunLog
from marlora.trainers.weight_sync.publisher import Publisher
from marlora.trainers.weight_sync.sync import WeightSync
from marlora.trainers.weight_sync.team_states import TeamStates
from tests.trainers.reading import rows
from tests.trainers.small_run import EPISODES, config, trainer

TASK = Task("t", "a prompt", "42")


def episode(*turns: tuple[str, int]) -> Episode:
    """`turns`: (agent, sampled tokens)."""
    spoken = [
        Turn(n, agent, policy=agent, token_ids=(7,) * count, logprobs=(-1.0,) * count)
        for n, (agent, count) in enumerate(turns)
    ]
    return Episode("e", "g", TASK, turns=tuple(spoken))


def test_drops_are_counted_by_agent_and_length() -> None:
    found = [
        episode(("a", 3), ("b", 1), ("a", 2)),
        episode(("a", 5)),
        episode(("a", 64), ("b", 65)),
    ]
    assert by_length(found) == {"a": {"<=8": 2, "<=64": 1}, "b": {"<=1": 1, "<=128": 1}}
    assert CollectedStep([], 1.0, [], found).row(0) == {
        "dropped_stale": {"episodes": 3, "tokens": by_length(found)}
    }
    assert CollectedStep([], 1.0, [0, 1, 1]).row(1) == {
        "tokens_per_s": 0.0,
        "staleness": 2 / 3,
        "max_staleness": 1,
    }
    assert CollectedStep([], 1.0, [0, 0]).row(0) == {}


# schedules at random: a stage without models, whose latencies are turns of the event loop


class GivenVersions(WeightSync):
    """Versions that the test names instead of publishing adapters."""

    versions: dict[str, str]

    @property
    def current(self) -> dict[str, str]:
        return self.versions


class World:
    """Plays and "learns" with the real `RolloutManager` and `AsyncCollector`. Learning a step makes
    the versions `POLICY-vSTEP`, or the value `a.prompt: vSTEP`.

    Args:
        moves: what a step changes, `versions` or `values`.
        latencies: loop turns that each reply, and each learning, takes; used again and again.
        exact: does the engine repeat itself to the last bit?
    """

    def __init__(
        self,
        folder: Path,
        bound: int,
        latencies: Sequence[int],
        room: int,
        exact: bool,
        last: int,
        pin: str = "episode",
        moves: str = "versions",
    ) -> None:
        self.moves, self.values = moves, dict[str, str]()
        self.folder, self.latencies, self.exact, self.last, self.asked = (
            folder,
            latencies,
            exact,
            last,
            0,
        )
        self.begun: dict[
            int, int
        ] = {}  # by step: the step that was to be learnt when its first reply was asked for
        self.now, self.versions = 1, dict[str, str]()
        self.deterministic = exact
        self.config = SimpleNamespace(
            max_staleness=bound,
            max_concurrency=room,
            num_generations=2,
            oversample=0,
            max_steps=last,
            pin=pin,
            folder=folder,
        )
        self.system = Chain(["a", "b"])

    def wait(self) -> int:
        self.asked += 1
        return self.latencies[self.asked % len(self.latencies)]

    async def speak(self, call: Call, version: str) -> list[Completion]:
        for _ in range(self.wait()):
            await asyncio.sleep(0)
        return [
            Completion("x", (1,), (2, 3), (-1.0, -1.0), policy=call.agent.policy, version=version)
        ]

    def tasks_of(self, step: int) -> list[Task]:
        self.begun.setdefault(step, self.now)
        return [Task(f"{step}-{n}", str(step), "") for n in range(2)]

    def open(self, step: int, team: dict[int, TeamState]) -> None:
        learner = SimpleNamespace(agents=self.system.specs, bases={}, policies={})
        self.sync = GivenVersions(self.config, learner, self.values, lambda records: None)  # type: ignore[arg-type]
        self.sync.team = TeamStates(self.config.max_staleness, team, self.config.pin)
        self.sync.versions = self.versions
        self.stage = RolloutManager(
            self.config,  # type: ignore[arg-type]
            self.system,
            [],
            [],
            engines=SimpleNamespace(deterministic=self.deterministic),  # type: ignore[arg-type]
            sync=self.sync,
            log=RunLog(self.config),  # type: ignore[arg-type]
        )
        self.stage.join(None, None)  # type: ignore[arg-type]
        self.stage.tasks_of, self.stage.metric = self.tasks_of, "correct"  # type: ignore[method-assign]
        self.stage.background, self.stage.store = BackgroundLoop(), Store(self.folder, fsync=False)
        self.stage.runner = EpisodeRunner(
            self.system,
            {"a": self.speak, "b": self.speak},
            limits=EpisodeLimits(concurrency=1000),
            version_policy=self.config.pin,
        )
        self.stage.start()
        self.sync.put_in_force(step)

    def close(self) -> None:
        self.stage.ahead.close()
        self.stage.background.close()
        self.stage.store.close()

    def learn(self, step: int, name: str) -> None:
        async def work() -> None:
            for _ in range(self.wait() * 3):
                await asyncio.sleep(0)

        self.stage.background.run(work())
        if self.moves == "versions":
            self.versions = {policy: f"{policy}-{name}{step}" for policy in ("a", "b")}
            self.sync.versions = self.versions
        else:
            self.values["a.prompt"] = f"{name}{step}"
        self.sync.put_in_force(step)
        self.now = step + 1


def behind(episode: Episode, step: int) -> int:
    """From the names alone: `a-v3-02dfb623` is one behind at step 5, and so is a prompt `v3`."""
    names = [*episode.state.versions.values(), *episode.state.values.values()]
    played = {int(name.rpartition("v")[2].partition("-")[0]) for name in names} or {0}
    assert len(played) == 1, "a state is of one step"
    return step - 1 - played.pop()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return iter(tmp_path_factory.mktemp("schedule") / str(n) for n in range(10**6))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bound=st.integers(0, 3),
    latencies=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    room=st.integers(1, 9),
    exact=st.booleans(),
    kills=st.lists(st.integers(1, 6), max_size=2),
    saved=st.integers(1, 3),
    same=st.booleans(),
    moves=st.sampled_from(["versions", "values"]),
)
@example(
    bound=1, latencies=[5], room=1, exact=False, kills=[5], saved=3, same=True, moves="versions"
)  # stored by versions that are learnt again only later
@example(bound=1, latencies=[5], room=1, exact=False, kills=[5], saved=3, same=True, moves="values")
@example(
    bound=2,
    latencies=[9, 1],
    room=3,
    exact=False,
    kills=[6, 3],
    saved=3,
    same=False,
    moves="versions",
)
@example(
    bound=2,
    latencies=[9, 1],
    room=3,
    exact=False,
    kills=[6, 3],
    saved=3,
    same=False,
    moves="values",
)
def test_whatever_the_schedule_nothing_is_too_old_lost_or_counted_twice(
    folders: Iterator[Path],
    bound: int,
    latencies: list[int],
    room: int,
    exact: bool,
    kills: list[int],
    saved: int,
    same: bool,
    moves: str,
) -> None:
    """Seven steps, cut off at random ones and resumed from checkpoints of every `saved`-th. `same`:
    do steps learnt again come out the same?"""
    last, world = 7, World(next(folders), bound, latencies, room, exact, 7, moves=moves)
    step, team, name = 1, dict[int, TeamState](), "v"
    checkpoint: tuple[int, dict[int, TeamState], dict[str, str], dict[str, str]] = (1, {}, {}, {})
    consumed: dict[int, list[Episode]] = {}
    world.open(0, team)
    while step <= last:
        if kills and kills[0] == step:
            kills.pop(0)
            world.close()
            step, team, versions, values = checkpoint
            world.versions, world.values = dict(versions), dict(values)
            world.now, world.begun = step, {}
            name = name if same else f"again{len(kills)}-v"
            world.open(step - 1, team)
        rollout = world.stage.ahead.take(step)
        found = rollout.episodes
        assert (
            len(found) == 4
            and len({e.id for e in found}) == 4
            and all(len(e.turns) == 2 for e in found)
        )
        assert all(e.step == step for e in found)
        assert [behind(e, step) for e in found] == rollout.ages and max(rollout.ages) <= bound
        if exact:
            assert set(rollout.ages) == {min(bound, step - 1)}, (
                "the version follows from the step's number"
            )
        if step in consumed and same:
            assert found == consumed[step], "learnt again from the same episodes"
            assert rollout.dropped == []
        assert world.begun[step] >= step - bound, "begun no more than S steps ahead"
        consumed[step] = found
        world.learn(step, name)
        step += 1
        if step % saved == 0:
            checkpoint = (step, dict(world.sync.team.of), dict(world.versions), dict(world.values))
    world.close()
    stored = [e.id for e in Store(world.folder)]
    assert len(stored) == len(set(stored)) and {
        e.id for es in consumed.values() for e in es
    } <= set(stored)
    if same:
        assert len(stored) == 4 * last, "each episode was played and stored once"


@pytest.mark.parametrize(
    ("pin", "spoke"), [("episode", ["a-v1", "b-v1"]), ("call", ["a-v1", "b-v2"])]
)
def test_what_is_pinned_keeps_its_version(pin: str, spoke: list[str], tmp_path: Path) -> None:
    """Step 2 is learnt between the two turns of step 3's episodes, which began before."""
    world = World(tmp_path, 1, [2], 8, False, 4, pin)
    speak = world.speak

    async def slowly(call: Call, version: str) -> list[Completion]:
        said = await speak(call, version)
        while call.agent.name == "a" and call.messages[-1].content == "3" and world.now < 3:
            await asyncio.sleep(0)
        return said

    world.speak = slowly  # type: ignore[method-assign]
    world.open(0, {})
    for step in (1, 2):
        world.stage.ahead.take(step)
        world.learn(step, "v")
    taken = world.stage.ahead.take(3)
    assert taken.ages == [1] * 4 and all(
        e.state.versions == {"a": "a-v1", "b": "b-v1"} for e in taken.episodes
    )
    assert [[turn.version for turn in e.turns] for e in taken.episodes] == [spoke] * 4
    world.close()


def test_stored_episodes_of_versions_that_nobody_knows_are_played_anew_and_counted(
    tmp_path: Path,
) -> None:
    """Resumed on hardware that does not repeat itself: step 3 had been played by a version that
    this time came out otherwise."""
    world, first, second = (
        World(tmp_path, 1, [2], 1, False, 5),
        {"a": "a-v1", "b": "b-v1"},
        {"a": "a-v2", "b": "b-v2"},
    )
    speak = world.speak

    async def slowly(call: Call, version: str) -> list[Completion]:
        while (
            call.messages[-1].content == "3" and world.now < 3
        ):  # there is room for one: the others begin after step 2 is learnt
            await asyncio.sleep(0)
        return await speak(call, version)

    world.speak = slowly  # type: ignore[method-assign]
    world.open(0, {})
    for step in (1, 2):
        world.stage.ahead.take(step)
        world.learn(step, "v")
    taken = world.stage.ahead.take(3)
    assert [e.state.versions for e in taken.episodes] == [
        first,
        second,
        second,
        second,
    ] and taken.ages == [1, 0, 0, 0]
    world.close()
    world.open(2, {1: TeamState(first)})
    again = world.stage.ahead.take(3)
    assert again.episodes == taken.episodes and again.ages == taken.ages and again.dropped == []
    world.close()
    world.versions = {"a": "a-other2", "b": "b-other2"}
    world.open(2, {1: TeamState(first)})
    rollout = world.stage.ahead.take(3)
    assert [e.id for e in rollout.dropped] == [e.id for e in taken.episodes]
    assert rollout.row(1)["dropped_stale"] == {
        "episodes": 4,
        "tokens": {"a": {"<=2": 4}, "b": {"<=2": 4}},
    }
    assert all(
        e.id.startswith("train-000003.1/") and e.state.versions == world.versions
        for e in rollout.episodes
    )
    world.close()


# whole runs, on the in-process engine


def weights(made: GRPOTrainer) -> dict[str, str]:
    return {
        p: base.adapters.sha256(p)
        for base in made.run.learner.bases.values()
        for p in base.policies
    }


def test_s_0_is_the_synchronous_run_bit_for_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Against a loop that plays a step to its end before it learns it, and knows nothing of
    staleness."""
    ours = trainer(tmp_path / "ours", model)
    ours.train()
    plain = trainer(tmp_path / "plain", model)

    def synchronous(self: AsyncCollector, step: int) -> CollectedStep:
        rollouts = plain.run.rollouts
        label, count = f"train-{step:06d}", plain.args.num_generations
        requests = training_requests(rollouts.tasks_of(step), label, count, step)
        work = rollouts.begin(
            label, find_stored(rollouts.store, requests), rollouts.runner, rollouts.sync.state
        )
        return CollectedStep(work.result(rollouts.stop).episodes, 1.0)

    monkeypatch.setattr(AsyncCollector, "take", synchronous)
    plain.train()
    assert weights(ours) == weights(plain)
    played = [
        {e.id: dataclasses.replace(e, usage={}) for e in Store(tmp_path / f / "episodes")}
        for f in ("ours", "plain")
    ]
    assert played[0] == played[1] and len(played[0]) > 3 * EPISODES


@pytest.mark.parametrize("bound", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ahead_repeats_itself_and_says_how_old_its_episodes_were(
    bound: int, model: Path, tmp_path: Path, one_thread: None
) -> None:
    found = []
    for name in ("one", "two"):
        made = trainer(tmp_path / name, model, max_staleness=bound, max_steps=4, eval_every=2)
        made.train()
        found.append(weights(made))
        assert [(row["staleness"], row["max_staleness"]) for row in rows(tmp_path / name)] == [
            (min(bound, step), min(bound, step)) for step in range(4)
        ]
        assert not any("dropped_stale" in row for row in rows(tmp_path / name))
        played = list(Store(tmp_path / name / "episodes").read(kind="train"))
        assert sorted(e.step for e in played) == [
            step for step in (1, 2, 3, 4) for _ in range(EPISODES)
        ]
        for e in played:
            assert behind(e, e.step) == min(bound, e.step - 1)
            assert all(turn.version == e.state.versions.get(turn.policy, "") for turn in e.turns)
    assert found[0] == found[1]
    synchronous = trainer(tmp_path / "sync", model, max_steps=4, eval_every=2)
    synchronous.train()
    assert weights(synchronous) != found[0], "else nothing was played ahead"
    assert "staleness" not in rows(tmp_path / "sync")[0]
    told = {
        name: "mean age of the versions" in (tmp_path / name / "report.html").read_text()
        for name in ("one", "two", "sync")
    }
    assert told == {"one": True, "two": True, "sync": False}, "the report draws it"


def test_weights_are_verified_while_nothing_else_is_decoded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked to verify step 1 waits for the slow episodes of step 2, which else would be
    decoded with it or without it as chance has it."""
    open_calls, met = Counter[str](), list[int]()
    speak, verify = EngineCompleter.__call__, Publisher.verify

    async def slowly(self: EngineCompleter, *args: Any, **kwargs: Any) -> Any:
        open_calls["now"] += 1
        try:
            await asyncio.sleep(0.2)
            return await speak(self, *args, **kwargs)
        finally:
            open_calls["now"] -= 1

    async def watched(self: Publisher, *args: Any, **kwargs: Any) -> Any:
        met.append(open_calls["now"])
        return await verify(self, *args, **kwargs)

    monkeypatch.setattr(EngineCompleter, "__call__", slowly)
    monkeypatch.setattr(Publisher, "verify", watched)
    trainer(tmp_path / "run", model, max_staleness=1, max_steps=2, proof_every=1).train()
    assert met == [0, 0, 0]  # of what the run began with, of step 1, of step 2


def test_settings_that_cannot_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="max_staleness: expected at least 0, got -1"):
        config("x", "y", max_staleness=-1)
    with pytest.raises(SettingError, match="max_staleness: with `episodes` nothing is played"):
        config("x", "y", max_staleness=1, episodes="runs/other")
    with pytest.raises(SettingError, match="pin: call changes nothing unless rollouts run ahead"):
        config("x", "y", pin="call")
    with pytest.raises(
        SettingError, match="pin: call with an engine that repeats itself to the last bit"
    ):
        trainer(tmp_path / "run", model, pin="call", max_staleness=1).train()
