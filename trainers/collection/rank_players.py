"""Episodes on every rank: rank 0 asks the others to play a share of what it collects, and stores
what they send back.

Which rank plays an episode changes nothing in it: its seed follows from its id. So the assignment
is free, and an episode goes to the rank that plays the fewest. Rank 0 decides when it begins and
with which state, so that staleness, resuming and the order of a step's episodes are as with one
rank. What only one process can know or count stays on rank 0, see `why_alone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...agents.state import TeamState
from ...agents.types import to_json
from ...rollouts.episodes.codec import unpack
from ...rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ...rollouts.ledger import Ledger
from ...rollouts.rewards.judge import Judge
from ...rollouts.types import Episode
from ...rollouts.usage import usage_by_policy
from ..distributed.messages import Connection
from ..distributed.ranks import Ranks
from ..errors import RankLost, RunError
from .background import BackgroundLoop
from .player_service import FAILURES, StateExchange

if TYPE_CHECKING:  # what plays needs no model
    from ..monitoring.run_log import RunLog
    from .engines import EngineGroup


Here = Callable[[], Awaitable[list[Episode]]]


def why_alone(engines: EngineGroup, runner: EpisodeRunner, ledger: Ledger) -> str:
    """Why rank 0 has to play all episodes itself, "" if others may play some."""
    if engines.deterministic:
        return "what its engine answers depends, in the last bit, on what is decoded together"
    if ledger.limited("train"):
        return "the budget is asked before every call, and is kept in one place"
    if any(policy.url for policy in engines.learner.policies.values()):
        return "an outside model counts what one address asks"
    if any(isinstance(reward, Judge) for reward in runner.rewards):
        return "talks with a judge are looked up in the store"
    if runner.version_policy == "call":
        return "pin: call asks for the newest versions at every call"
    return ""


@dataclasses.dataclass
class _Peer:
    """Another rank, as rank 0 sees it. `open`: its episodes, by number, to be answered; `resting`:
    why it is asked no more; `lost`: why it cannot be."""

    connection: Connection
    states: StateExchange = dataclasses.field(default_factory=StateExchange)
    open: dict[int, asyncio.Future[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    resting: str = ""
    lost: str = ""


class RankPlayers:
    """The other ranks as players, on rank 0.

    Args:
        ranks: of the run.
        peers: those that can play.
        background: the loop that episodes are played in.
        ledger: books what episodes of theirs cost that come to nothing.
        warn: is given a line about a rank that plays no more.

    `here`: how many of the shared episodes rank 0 plays itself at the moment. `lines`: of episodes
    that came from another rank and are not stored yet, as the store encodes them.
    """

    def __init__(
        self,
        ranks: Ranks,
        peers: Sequence[int],
        background: BackgroundLoop,
        ledger: Ledger,
        warn: Callable[[str], None],
    ) -> None:
        self.ledger, self.warn, self.here = ledger, warn, 0
        self.lines: dict[str, bytes] = {}
        self._loop = background.loop
        self._numbers = itertools.count()
        self._peers = {peer: self._connected(ranks, peer) for peer in peers}

    @classmethod
    def opened(
        cls,
        ranks: Ranks,
        engines: EngineGroup,
        runner: EpisodeRunner,
        background: BackgroundLoop,
        log: RunLog,
        closing: contextlib.ExitStack,
    ) -> RankPlayers | None:
        """Offer this run's engines to the other ranks, which answer with `player_service.serve`;
        None if what `runner` plays cannot be shared."""
        ledger = runner.ledger or Ledger()
        why = why_alone(engines, runner, ledger)
        if why:
            log.say(f"rank 0 plays all episodes: {why}")
        ranks.on_main(lambda: None if why else engines.addresses())
        if why:
            return None
        problems = ranks.gather("")
        for rank, problem in enumerate(problems):
            if problem:
                log.warn(f"rank {rank} does not play: {problem}")
        peers = [rank for rank, problem in enumerate(problems) if rank and not problem]
        players = cls(ranks, peers, background, ledger, log.warn)
        closing.callback(players.close)
        closing.callback(background.start(engines.look_after(log.warn)).cancel)
        return players

    def _connected(self, ranks: Ranks, number: int) -> _Peer:
        def received(message: Mapping[str, Any]) -> None:
            self._loop.call_soon_threadsafe(self._answered, number, message)

        def lost(why: str) -> None:
            self._loop.call_soon_threadsafe(self._lose, number, why)

        connection = ranks.connection(number, received, lost)
        connection.begin()
        return _Peer(connection)

    async def play(
        self, how: str, request: EpisodeRequest, state: TeamState, here: Here
    ) -> list[Episode]:
        """The episode after its children, played by the rank with the fewest open ones; by rank 0,
        with `here`, if that has fewer. `how`: `sampled` or `greedy`.

        Raises `RankLost` if that rank ends. One whose engine fails is asked no more, and what it
        was asked for is played here. A server that rank 0 starts again is no failure: the others
        wait for it (`attach_engine`).
        """
        awake = {number: peer for number, peer in self._peers.items() if not peer.resting}
        number = min(awake, key=lambda n: len(awake[n].open), default=0)
        if not awake or self.here < len(awake[number].open):
            return await self._play_here(here)
        answer = await self._asked(number, how, request, state)
        if answer["problem"] is None:
            episodes = self._episodes(answer, request)
            for episode, line in zip(episodes, answer["episodes"], strict=True):
                self.lines[episode.id] = line.encode()
            return episodes
        self.ledger.spent_elsewhere(answer["spent"])
        kind, text = answer["problem"]
        if kind != "EngineError":
            raise FAILURES.get(kind, RunError)(f"rank {number}: {text}")
        if not awake[number].resting:
            awake[number].resting = text
            self.warn(f"rank {number} plays no more, the others go on: {text}")
        return await self._play_here(here)

    async def _play_here(self, here: Here) -> list[Episode]:
        self.here += 1
        try:
            return await here()
        finally:
            self.here -= 1

    async def _asked(
        self, rank: int, how: str, request: EpisodeRequest, state: TeamState
    ) -> Mapping[str, Any]:
        """What the rank answers. Called off, its episode is called off there too, and its end is
        waited for: adapter versions may be unloaded after this."""
        peer, number = self._peers[rank], next(self._numbers)
        if peer.lost:
            raise RankLost(peer.lost)
        answer: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        peer.open[number] = answer
        peer.connection.send(
            {
                "what": "play",
                "number": number,
                "how": how,
                "request": to_json(request),
                "states": peer.states.to_send([state]),
                "state": state.key,
            }
        )
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            peer.connection.send({"what": "cancel", "number": number})
            await asyncio.wait([answer])
            if answer.exception() is None:
                self._waste(answer.result(), request)
            raise
        finally:
            del peer.open[number]

    def _episodes(self, answer: Mapping[str, Any], request: EpisodeRequest) -> list[Episode]:
        states = answer["states"].__getitem__
        *children, episode = (unpack(json.loads(line), states) for line in answer["episodes"])
        return [*children, dataclasses.replace(episode, task=request.task)]

    def _waste(self, answer: Mapping[str, Any], request: EpisodeRequest) -> None:
        """Book an episode that is not wanted any more."""
        rows = list(answer.get("spent", ()))
        for episode in self._episodes(answer, request) if answer["episodes"] else ():
            rows += [
                {"kind": kind, "agent": agent, "policy": policy, **to_json(usage)}
                for (kind, agent, policy), usage in usage_by_policy(episode).items()
            ]
        self.ledger.spent_elsewhere(rows)

    def _answered(self, rank: int, message: Mapping[str, Any]) -> None:
        peer = self._peers[rank]
        states = peer.states.receive(message["states"])
        answer = peer.open.get(message["number"])  # None: called off twice, so not waited for
        if answer is not None:
            answer.set_result({**message, "states": states})

    def _lose(self, rank: int, why: str) -> None:
        """No answer will come from this rank, nor will any collective end."""
        peer = self._peers[rank]
        peer.lost = peer.lost or (
            f"rank {rank} is gone ({why}) while it played {len(peer.open)} episodes; what was"
            " stored before is whole: start the run again with --resume"
        )
        for answer in peer.open.values():
            if not answer.done():
                answer.set_exception(RankLost(peer.lost))

    def lines_of(self, episodes: Sequence[Episode]) -> dict[str, bytes]:
        """The lines of these that came from other ranks, which are given once."""
        return {e.id: self.lines.pop(e.id) for e in episodes if e.id in self.lines}

    def close(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()
