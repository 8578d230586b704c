"""Episodes that other ranks play are those that rank 0 would have played, whatever becomes of a
rank."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import TeamState
from marlora.agents.system import System
from marlora.agents.types import PolicySpec, Sampling, SettingError, Task, to_json
from marlora.rollouts.budget import Budget
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes import store
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRunner, episode_requests
from marlora.rollouts.episodes.store import Store, encode
from marlora.rollouts.ledger import Ledger
from marlora.rollouts.rewards.judge import Judge
from marlora.rollouts.types import Episode
from marlora.trainers.collection import engines as engine_group
from marlora.trainers.collection.background import BackgroundLoop
from marlora.trainers.collection.player_service import (
    GREEDY,
    SAMPLED,
    PlayerService,
    StateExchange,
    share_episodes,
)
from marlora.trainers.collection.rank_players import RankPlayers, why_alone
from marlora.trainers.distributed.messages import first_sentence
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.errors import RankLost

PLAN = episode_requests([Task(str(n), f"task {n}", 7) for n in range(6)], label="t", step=1)
Speak = Callable[[str, int], str]  # (prompt, rank) -> reply


class Wire:
    """A connection of two ranks in one process: JSON goes to and fro in the order it was sent."""

    def __init__(self, received: Callable[[Any], None], lost: Callable[[str], None]) -> None:
        self.received, self.lost, self.sent = received, lost, list[Any]()
        self.other: Wire | None = None

    def begin(self) -> None: ...

    def close(self) -> None: ...

    def send(self, message: Any) -> None:
        self.sent.append(json.loads(json.dumps(message)))
        assert self.other is not None
        self.other.received(self.sent[-1])


class Room:
    """Rank 0 and others, each with an event loop, an engine and a runner of its own.

    `played`: which rank was asked for a reply, by prompt. `publishes`: versions, by rank.
    """

    def __init__(self, speak: Speak, ranks: int = 2, system: System | None = None) -> None:
        self.speak, self.system = speak, system or Chain(["a", "b"])
        self.asked: list[int] = []
        self.warnings: list[str] = []
        self.loops = [BackgroundLoop() for _ in range(ranks)]
        self.engines: list[ScriptedEngine] = []
        self.runners = [self._runner(rank) for rank in range(ranks)]
        self.ledger = Ledger()
        self.wires: dict[int, Wire] = {}
        hub = SimpleNamespace(connection=self._from_rank_0)
        self.players = RankPlayers(
            hub,  # type: ignore[arg-type]
            range(1, ranks),
            self.loops[0],
            self.ledger,
            self.warnings.append,
        )
        self.services = [self._service(rank) for rank in range(1, ranks)]

    def _service(self, rank: int) -> PlayerService:
        ends = SimpleNamespace(connection=lambda peer, *does: self._to_rank_0(rank, *does))
        return PlayerService(ends, self.loops[rank], self.runners[rank], self._publish)  # type: ignore[arg-type]

    async def _publish(self, versions: Mapping[str, str]) -> None: ...

    def _from_rank_0(self, peer: int, received: Any, lost: Any) -> Wire:
        self.wires[peer] = Wire(received, lost)
        return self.wires[peer]

    def _to_rank_0(self, rank: int, received: Any, lost: Any) -> Wire:
        wire = Wire(received, lost)
        wire.other, self.wires[rank].other = self.wires[rank], wire
        return wire

    def _runner(self, rank: int) -> EpisodeRunner:
        def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
            self.asked.append(rank)
            return f"{self.speak(prompt, rank)} {(sampling.seed or 0) % 1000}"

        engine = ScriptedEngine(answer, latency=0.001)
        self.engines.append(engine)
        speakers = {p: EngineCompleter(engine, engine.tokens, p) for p in ("a", "b")}
        return EpisodeRunner(
            self.system, speakers, [lambda task, e: len(str(e.output)) + task.answer], seed=3
        )

    def play(self, how: str = SAMPLED, spread: bool = True) -> list[Episode]:
        """The plan's episodes, in its order."""
        runner = dataclasses.replace(
            self.runners[0].greedy() if how == GREEDY else self.runners[0], ledger=self.ledger
        )
        state = TeamState(values={"note": "x" * 50})

        async def work() -> list[Episode]:
            shared = (lambda *args: self.players.play(how, *args)) if spread else None
            return [e async for e in runner.collect(PLAN, state, None, shared)]

        found = {episode.id: episode for episode in self.loops[0].run(work())}
        return [found[id_] for id_ in sorted(found)]

    def close(self) -> None:
        for service in self.services:
            service.close()
        for loop in self.loops:
            loop.close()


@pytest.fixture
def room(request: pytest.FixtureRequest) -> Iterator[Callable[..., Room]]:
    made: list[Room] = []

    def make(speak: Speak = lambda prompt, rank: "said", **more: Any) -> Room:
        made.append(Room(speak, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def record(episodes: list[Episode]) -> list[dict[str, Any]]:
    """All of them but the seconds."""
    rows = [to_json(episode) for episode in episodes]
    for row in rows:
        for usage in row["usage"].values():
            usage["seconds"] = 0.0
    return rows


@pytest.mark.parametrize("how", [SAMPLED, GREEDY])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_plays_the_same_episodes_as_one(
    room: Callable[..., Room], ranks: int, how: str
) -> None:
    made = room(ranks=ranks)
    alone = record(made.play(how, spread=False))
    assert set(made.asked) == {0}
    made.asked.clear()
    assert record(made.play(how)) == alone
    assert set(made.asked) == set(range(ranks)), "each has played"


class Parent(System):
    """Plays a child episode first."""

    async def run(self, task: Task, team: Any) -> str:
        (child,) = await team.play(Chain(["a"]), [Task("c", f"child of {task.id}", 1)])
        return str((await team["b"].reply(f"{child.output}")).text)


def test_children_come_with_their_parents(room: Callable[..., Room]) -> None:
    made = room(system=Parent(["a", "b"]))
    alone = record(made.play(spread=False))
    assert len(alone) == 2 * len(PLAN)
    assert record(made.play()) == alone


def test_what_another_rank_has_played_is_stored_as_it_came(
    room: Callable[..., Room], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not encoded a second time, and the line is the one that it would have."""
    made = room()
    episodes = made.play()
    expected = [encode(episode) for episode in episodes]
    lines = made.players.lines_of(episodes)
    assert 0 < len(lines) < len(episodes)
    assert made.players.lines_of(episodes) == {}, "given once"
    encoded: list[str] = []
    monkeypatch.setattr(store, "encode", lambda e: encoded.append(e.id) or encode(e))
    with Store(tmp_path) as written:
        assert written.extend(episodes, lines=lines) == len(episodes)
    assert sorted(encoded) == sorted({e.id for e in episodes} - lines.keys())
    (path,) = written.files()
    assert path.read_bytes() == b"".join(expected)


def test_every_rank_gets_the_episodes_that_rank_0_has(room: Callable[..., Room]) -> None:
    """Each as it is, with its state, whatever order the states come in."""
    made, sent = room(), list[Any]()
    episodes = made.play(spread=False)
    other = TeamState({"a": "a-v1"})
    episodes = [dataclasses.replace(e, state=other) if n % 3 else e for n, e in enumerate(episodes)]
    main, others = Ranks.__new__(Ranks), Ranks.__new__(Ranks)
    main.rank, main.size, others.rank, others.size = 0, 2, 1, 2
    main.on_main = lambda work: sent.extend(json.loads(json.dumps(work())))  # type: ignore[method-assign]
    others.on_main = lambda work: sent  # type: ignore[method-assign]
    assert share_episodes(main, lambda: episodes) == episodes
    assert share_episodes(others, lambda: []) == episodes


def test_a_state_is_told_once(room: Callable[..., Room]) -> None:
    made = room()
    made.play()
    told = [m["states"] for m in made.wires[1].sent if m["what"] == "play"]
    assert len(told) > 1
    assert [len(states) for states in told] == [1] + [0] * (len(told) - 1)


def test_the_last_state_is_known_and_others_are_told() -> None:
    ours, theirs = StateExchange(), StateExchange()
    one, two = TeamState({"a": "a-v1"}), TeamState({"a": "a-v2"})
    for states, new in (([one], 1), ([one], 0), ([one, two], 1), ([one], 1), ([one, one], 0)):
        sent = json.loads(json.dumps(ours.to_send(states)))
        assert len(sent) == new
        known = theirs.receive(sent)
        assert [known[state.key] for state in states] == states


def test_a_rank_whose_engine_fails_plays_no_more(room: Callable[..., Room]) -> None:
    """What it was asked for is played by rank 0, and what it had spent is booked."""

    def speak(prompt: str, rank: int) -> str:
        if rank == 1:
            raise EngineError("no answer")
        return "said"

    made = room(speak)
    alone = record(made.play(spread=False))
    spent = made.ledger.spent().calls
    assert record(made.play()) == alone
    assert made.warnings == ["rank 1 plays no more, the others go on: no answer"]
    failed = made.asked.count(1)
    assert failed > 0 and made.ledger.spent().calls == spent + failed + len(PLAN) * 2
    made.asked.clear()
    made.play()
    assert set(made.asked) == {0}


def test_servers_are_looked_after_until_one_has_died_too_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, warnings = list[Any](), list[str]()

    async def revive(engine: Any) -> None:
        looks.append(engine)
        if len(looks) == 4:
            raise EngineError("dead")

    monkeypatch.setattr(engine_group, "POLL", 0.001)
    monkeypatch.setattr(engine_group, "revive_servers", revive)
    group = engine_group.EngineGroup.__new__(engine_group.EngineGroup)
    group.of = {"a": "one", "b": "two"}  # type: ignore[dict-item]
    asyncio.run(group.look_after(warnings.append))
    assert looks == ["one", "two", "one", "two"]
    assert warnings == ["servers are looked after no more: dead"]


def test_a_failure_of_another_rank_names_it(room: Callable[..., Room]) -> None:
    def speak(prompt: str, rank: int) -> str:
        if rank == 1:
            raise SettingError("temperature: too hot")
        return "said"

    with pytest.raises(SettingError, match="rank 1: temperature: too hot"):
        room(speak).play()


def test_a_rank_that_is_gone_ends_what_waits_for_it(room: Callable[..., Room]) -> None:
    made = room(lambda prompt, rank: "said")
    made.engines[1].latency = 60.0

    async def lose() -> None:
        await asyncio.sleep(0.05)
        made.wires[1].lost("Connection closed by peer")

    work = made.loops[0].start(lose())
    with pytest.raises(RankLost, match=r"rank 1 is gone \(Connection closed by peer\) while it"):
        made.play()
    work.result()
    with pytest.raises(RankLost, match="rank 1 is gone"):
        made.play()


def test_episodes_that_are_called_off_end_on_their_rank_too(room: Callable[..., Room]) -> None:
    """The call that was open is booked: rank 0 waits for the answer."""
    made = room()
    made.engines[1].latency = 60.0
    request, state = PLAN[0], TeamState()

    async def here() -> list[Episode]:
        raise AssertionError("rank 1 is free")

    async def work() -> None:
        play = asyncio.create_task(made.players.play(SAMPLED, request, state, here))
        while not made.engines[1].calls:
            await asyncio.sleep(0.001)
        play.cancel()
        await asyncio.wait([play])
        assert play.cancelled()

    made.loops[0].run(work())
    assert [m["what"] for m in made.wires[1].sent] == ["play", "cancel"]
    assert made.ledger.spent().calls == 1


def test_what_gloo_says_is_cut_to_what_has_happened() -> None:
    said = "[/w/gloo/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:36481. This is typic"
    assert first_sentence(RuntimeError(said)) == "Connection closed by peer [127.0.0.1]:36481"
    assert first_sentence(RuntimeError("Timed out")) == "Timed out"


def test_what_is_kept_in_one_process_is_played_there(room: Callable[..., Room]) -> None:
    runner = room().runners[0]
    policies = {"a": PolicySpec("a")}

    def why(deterministic: bool = False, ledger: Ledger | None = None, **changes: Any) -> str:
        given = changes.pop("policies", policies)
        engines = SimpleNamespace(
            deterministic=deterministic, learner=SimpleNamespace(policies=given)
        )
        player = dataclasses.replace(runner, **changes)
        return why_alone(engines, player, ledger or Ledger())  # type: ignore[arg-type]

    assert why() == ""
    assert "decoded together" in why(deterministic=True)
    assert "budget" in why(ledger=Ledger(Budget(tokens=10)))
    outside = {"a": PolicySpec("a", url="http://x/v1", trainable=False)}
    assert "outside" in why(policies=outside)
    assert "judge" in why(rewards=[Judge.__new__(Judge)])
    assert "pin" in why(version_policy="call")
