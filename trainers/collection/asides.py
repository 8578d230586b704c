"""Asides: what an optimizer says to its helpers, as episodes of their own (kind `aside`), numbered
within their step, so that a resumed run takes what was answered before it was cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...agents.concurrency import gather
from ...agents.state import content_key
from ...agents.system import System
from ...agents.types import Task, to_json
from ...rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ...rollouts.types import Episode

Question = tuple[System, Task, str]  # who talks, about what, and the id of the episode it is about


class AsideNumbers:
    """Numbers the talks of a step, 0, 1, ... in the order in which they are asked for."""

    def __init__(self) -> None:
        self._step, self._next = 0, 0

    def take(self, step: int, count: int) -> int:
        """The first of `count` numbers."""
        first = self._next if self._step == step else 0
        self._step, self._next = step, first + count
        return first


def aside_requests(
    questions: Sequence[Question], step: int, first: int, attempt: int
) -> list[EpisodeRequest]:
    """The requests of these talks. An id holds what is asked: another question of the same number
    is another episode."""
    requests = []
    for number, (system, task, follows) in enumerate(questions, first):
        kind = f"{type(system).__module__}:{type(system).__qualname__}"
        content = [kind, system.arguments(), to_json(system.specs), to_json(task)]
        label = f"aside-{step:06d}/{number:04d}-{content_key(content, 'task')[:8]}"
        label += f".{attempt}" if attempt else ""
        requests.append(EpisodeRequest(task, label, 0, step, kind="aside", follows=follows))
    return requests


async def answers(
    requests: Sequence[EpisodeRequest],
    runners: Sequence[EpisodeRunner],
    keep: Callable[[Sequence[Episode]], None],
) -> list[Episode]:
    """Play each request with its runner; every one is stored as soon as it is there. The talks
    themselves, without what they played as children."""

    async def one(request: EpisodeRequest, runner: EpisodeRunner) -> Episode:
        episodes = [episode async for episode in runner.collect([request])]
        keep(episodes)
        return episodes[-1]

    return await gather(one(*each) for each in zip(requests, runners, strict=True))
