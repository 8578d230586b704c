"""Debate: all answer at once, read one another, answer again; the majority's answer counts.

Du et al., "Improving factuality and reasoning in language models through multiagent debate" (arXiv
2305.14325). With critics it is the debate of Multiagent Finetuning (Subramaniam et al., arXiv
2501.05707): every seat has a generator that answers first and a critic that goes on in its chat.
Not copied from there: the others' answers come in the order of seats, not shuffled, and all of
them, not five; a tie of the majority is broken by the episode's seed, where the authors' code takes
the answer that is last in the order of strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from ..chat import Agent
from ..concurrency import gather
from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.answers import majority
from ..text.templates import render
from ..types import SettingError, Task, Turn, nearest

REVISE = (
    "The others answered:\n\n{others}\n\nWeigh what they say, correct yourself where they are"
    " right, and answer the task again."
)
SUMMARISE = (
    "{prompt}\n\nSeveral answers to this:\n\n{others}\n\nSum up what they say: their answers, their"
    " reasons, where they differ. Do not answer yourself."
)


@trusted("system")
@dataclass
class Debate(System):
    """At least two seats, `rounds` answers each (1: no debate, only a vote). Ties: see
    `answers.majority`.

    Args:
        critics: the first half of the agents are generators, the second half their critics, in the
            same order; from round 2 on critic i continues the chat of generator i. False: an agent
            answers in all rounds.
        summariser: an agent, besides these, that sums up for each seat the others' texts, shown in
            their place; "" is none.
        revise: a seat's prompt after a round, as a template with the fields `others` and `prompt`.
    """

    rounds: int = setting("answers of each seat; 1 is only a vote", 2, at_least=1)
    critics: bool = False
    summariser: str = ""
    revise: str = REVISE

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        if self.summariser and self.summariser not in names:
            raise SettingError(
                f"Debate: summariser {self.summariser!r} is no agent;"
                f" {nearest(self.summariser, names)}"
            )
        seated = len(names) - bool(self.summariser)
        if self.critics and (seated % 2 or self.rounds < 2):
            raise SettingError(
                "Debate: with critics as many generators as critics and rounds >= 2 expected, got"
                f" {seated} agents and rounds={self.rounds}"
            )
        if len(self.seats) < 2:
            raise SettingError(f"Debate: at least two agents expected, got {len(self.seats)}")
        self._revision(Task("", ""), "")  # checks the template

    @property
    def seats(self) -> list[tuple[str, str]]:
        """By seat: the agent of round 1, and the agent from round 2 on."""
        names = [spec.name for spec in self.specs if spec.name != self.summariser]
        half = len(names) // 2
        return (
            list(zip(names[:half], names[half:], strict=True))
            if self.critics
            else [(name, name) for name in names]
        )

    @property
    def member_of(self) -> dict[str, str]:
        """Agent -> its seat, named after its agent of round 1. A summariser has none."""
        return {name: first for first, later in self.seats for name in (first, later)}

    async def run(self, task: Task, team: Team) -> str:
        chats = [team[first] for first, _ in self.seats]
        drafts = await gather(agent.reply(task.prompt) for agent in chats)
        for number in range(self.rounds - 1):
            if self.critics and number == 0:
                chats = [
                    team[critic].take_over(agent)
                    for agent, (_, critic) in zip(chats, self.seats, strict=True)
                ]
            shown = [
                [draft for n, draft in enumerate(drafts) if n != seat] for seat in range(len(chats))
            ]
            quoted = [quote(others) for others in shown]
            if self.summariser:
                summaries = await gather(
                    self._summary(team[self.summariser], task, others) for others in shown
                )
                shown = [[summary] for summary in summaries]
                quoted = [summary.text for summary in summaries]
            prompts = [self._revision(task, others) for others in quoted]
            drafts = await gather(
                agent.reply(text, reads=reads)
                for agent, text, reads in zip(chats, prompts, shown, strict=True)
            )
        return majority(drafts, team.rng)

    def _summary(self, agent: Agent, task: Task, others: Sequence[Turn]) -> Awaitable[Turn]:
        fields = {"prompt": task.prompt, "others": quote(others)}
        return agent.fresh().reply(render(SUMMARISE, fields, setting="summarise"), reads=others)

    def _revision(self, task: Task, others: str) -> str:
        return render(self.revise, {"others": others, "prompt": task.prompt}, setting="revise")


def quote(turns: Sequence[Turn]) -> str:
    """The texts of others, each under its agent's name."""
    return "\n\n".join(f"[{turn.agent}] {turn.text}" for turn in turns)
