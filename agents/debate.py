"""Debate: all answer at once, read one another, answer again; the majority's answer counts.

Du et al., "Improving factuality and reasoning in language models through multiagent debate" (arXiv 2305.14325).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .answers import majority
from .team import System, Team, gather
from .types import SettingError, Task, Turn


@dataclass
class Debate(System):
    """At least two agents, `rounds` answers each (1: no debate, only a vote). Ties: see `answers.majority`."""

    rounds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) < 2 or self.rounds < 1:
            raise SettingError(
                f"Debate: at least two agents and rounds >= 1 expected, got {len(self.specs)} and rounds={self.rounds}"
            )

    async def run(self, task: Task, team: Team) -> str:
        drafts = await gather(agent.reply(task.prompt) for agent in team)
        for _ in range(self.rounds - 1):
            others = {agent.name: [draft for draft in drafts if draft.agent != agent.name] for agent in team}
            drafts = await gather(agent.reply(revise(others[agent.name]), reads=others[agent.name]) for agent in team)
        return majority(drafts, team.rng)


def revise(others: Sequence[Turn]) -> str:
    """What an agent is told after a round; the task and its own drafts stand in its chat already."""
    quoted = "\n\n".join(f"[{turn.agent}] {turn.text}" for turn in others)
    task = "Weigh what they say, correct yourself where they are right, and answer the task again."
    return f"The others answered:\n\n{quoted}\n\n{task}"
