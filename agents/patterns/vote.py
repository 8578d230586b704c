"""A vote: every agent answers on its own, without reading anyone; the majority's answer counts.

With one agent and several samples this is self-consistency (Wang et al., arXiv 2203.11171).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..concurrency import gather
from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.answers import majority
from ..types import Task


@trusted("system")
@dataclass
class Vote(System):
    """Each agent answers `samples` times, each time in a chat of its own: every answer has a vote,
    so every one is a turn of its own and none a sibling that was not taken. Ties: see
    `answers.majority`.
    """

    samples: int = setting("answers of each agent", 1, at_least=1)

    async def run(self, task: Task, team: Team) -> str:
        drafts = await gather(
            agent.fresh().reply(task.prompt) for agent in team for _ in range(self.samples)
        )
        return majority(drafts, team.rng)
