"""What the other ranks do while rank 0 collects: they play the episodes that rank 0 asks them for.

A rank plays with its own event loop, system, rewards and connections to the engines' servers, and
sends every episode back as the store packs it. Seeds follow from the request, so it is the episode
that rank 0 would have played.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...agents.state import TeamState
from ...agents.types import SettingError, from_json, to_json
from ...rollouts.engines.base import EngineError
from ...rollouts.episodes.codec import pack, unpack
from ...rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ...rollouts.episodes.store import encode
from ...rollouts.ledger import Ledger
from ...rollouts.types import Episode
from ..distributed.ranks import Ranks
from .background import BackgroundLoop, unless_gone

if TYPE_CHECKING:  # what plays needs no model
    from .engines import EngineGroup


SAMPLED, GREEDY = "sampled", "greedy"  # how an episode is played: with the run's sampling, or at 0
FAILURES: Mapping[str, type[Exception]] = {"EngineError": EngineError, "SettingError": SettingError}


class StateExchange:
    """Team states that one rank names to another: one is sent whenever it is not the last again."""

    def __init__(self) -> None:
        self._sent, self._received = "", TeamState()

    def to_send(self, states: Iterable[TeamState]) -> dict[str, Any]:
        """Those of these states, as JSON by key, that the other rank has to be told."""
        new = {state.key: to_json(state) for state in states if state.key != self._sent}
        self._sent = next(reversed(new), self._sent)
        return new

    def receive(self, sent: Mapping[str, Any]) -> dict[str, TeamState]:
        """The states that the message with these may name, by key."""
        new = {key: from_json(TeamState, state) for key, state in sent.items()}
        known = {self._received.key: self._received, **new}
        self._received = known[next(reversed(new), self._received.key)]
        return known


def share_episodes(ranks: Ranks, produce: Callable[[], Sequence[Episode]]) -> list[Episode]:
    """What rank 0 alone produces on every rank, as the store packs it: a third of the time that
    plain JSON takes."""
    states = StateExchange()
    return ranks.share(
        produce,
        Episode,
        lambda episode: [pack(episode), states.to_send([episode.state])],
        lambda data: unpack(data[0], states.receive(data[1]).__getitem__),
    )


class PlayerService:
    """Plays for rank 0 until it is closed.

    Args:
        ranks: of which this is not rank 0.
        background: the loop that the episodes are played in.
        runner: plays as rank 0's does.
        publish: makes adapter versions known to this rank's engines before they are asked for.
    """

    def __init__(
        self,
        ranks: Ranks,
        background: BackgroundLoop,
        runner: EpisodeRunner,
        publish: Callable[[Mapping[str, str]], Awaitable[None]],
    ) -> None:
        self.background, self.publish = background, publish
        self.runners = {SAMPLED: runner, GREEDY: runner.greedy()}
        self._states = StateExchange()
        self._playing: dict[int, asyncio.Task[None]] = {}

        def received(message: Mapping[str, Any]) -> None:
            background.loop.call_soon_threadsafe(self._take, message)

        # a lost rank 0 is noticed by the main thread, which waits for it or trains with it
        self.connection = ranks.connection(0, received, lambda why: None)
        self.connection.begin()

    def close(self) -> None:
        """Call off what is still played, and end the connection."""

        async def end() -> None:
            playing = list(self._playing.values())
            for task in playing:
                task.cancel()
            await asyncio.gather(*playing, return_exceptions=True)

        with unless_gone():
            self.background.run(end())
        self.connection.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        number = message["number"]
        if message["what"] == "cancel":
            if number in self._playing:  # else its answer is on the way
                self._playing[number].cancel()
            return
        state = self._states.receive(message["states"])[message["state"]]
        request = from_json(EpisodeRequest, message["request"])
        self._playing[number] = self.background.loop.create_task(
            self._play(number, request, state, message["how"]), name=request.id
        )

    async def _play(self, number: int, request: EpisodeRequest, state: TeamState, how: str) -> None:
        """Play one and answer, whatever comes of it."""
        ledger = Ledger()  # of this episode: rank 0 keeps the run's
        runner = dataclasses.replace(self.runners[how], ledger=ledger)
        answer: dict[str, Any] = {"number": number, "episodes": [], "states": {}, "problem": None}
        try:
            await self.publish(state.versions)
            episodes = [episode async for episode in runner.collect([request], state)]
            answer["episodes"] = [encode(episode).decode() for episode in episodes]
            answer["states"] = self._states.to_send(episode.state for episode in episodes)
        except asyncio.CancelledError:
            answer["problem"] = ["CancelledError", ""]
            raise
        except BaseException as error:
            kind = next((k for k, cls in FAILURES.items() if isinstance(error, cls)), "")
            said = str(error) if kind else f"{type(error).__name__}: {error}"
            answer["problem"] = [kind, said]
            if not isinstance(error, Exception):
                raise
        finally:
            del self._playing[number]
            if answer["problem"] is not None:
                answer["spent"] = ledger.state_dict()["unstored"]
            self.connection.send(answer)


def serve(
    ranks: Ranks,
    engines: EngineGroup,
    runner: Callable[[], EpisodeRunner],
    closing: contextlib.ExitStack,
) -> None:
    """Play for rank 0 until `closing`, if it offers its engines and they can be asked from here.

    Args:
        runner: makes what plays as rank 0's runner does, once the engines are attached.
    """
    addresses = ranks.on_main(dict)  # what rank 0 gives there
    if addresses is None:
        return
    background, problem = BackgroundLoop(), ""
    closing.callback(background.close)
    try:
        engines.attach(addresses, background, closing)
    except (EngineError, SettingError) as error:
        problem = str(error)
    ranks.gather(problem)
    if not problem:
        service = PlayerService(ranks, background, runner(), engines.publish)
        closing.callback(service.close)
