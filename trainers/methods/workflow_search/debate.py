"""A debate about the next edit: two sides propose, a moderator compares, a judge decides in the end
(DebFlow, arXiv:2503.23781)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....agents.settings import setting
from ....agents.team import Team
from ....agents.text.templates import render
from ....agents.transcript import Output
from ....agents.types import Task, Turn
from ....rollouts.types import Episode
from .proposals import DRY_RUN, ProgramTalk, Proposal, checked, read_edit

AFFIRMATIVE, NEGATIVE = SIDES = ("affirmative", "negative")
GO_ON = "no"  # the moderator's word for: neither yet
VERDICT = "verdict"  # the operation that names the winning side

DISAGREE = """You debate how to improve a program. You disagree with the other side's answer.

{rules}

Problems that the program to be improved failed:
{failures}

The other side's answer:
{other}

Give your own answer, changed where theirs is wrong."""
AGAIN = """{rules}

Problems that the program to be improved failed:
{failures}

The other side's latest answer:
{other}

Do you agree with it? Give your answer anew, in whole."""
COMPARE = """Two sides propose how to improve a program that failed these problems:
{failures}

The affirmative side:
{affirmative}

The negative side:
{negative}

Which proposal will not show these failures? Reply with one word: affirmative, negative, or No if \
neither side is right yet."""
DECIDE = """Two sides proposed how to improve a program that failed these problems:
{failures}

The affirmative side:
{affirmative}

The negative side:
{negative}

Which proposal is the better one? Reply with one word: affirmative or negative."""
PROMPTS: Mapping[str, str] = {
    "disagree": DISAGREE,
    "again": AGAIN,
    "compare": COMPARE,
    "decide": DECIDE,
}


def verdict(reply: str, decisive: bool = False) -> str:
    """The side that a moderator or judge names, "" if it names none: the reply holds exactly one of
    the words affirmative, negative and, unless `decisive`, no; case and punctuation do not
    matter."""
    words = set(re.findall(r"[a-z]+", reply.lower()))
    choices = SIDES if decisive else (*SIDES, GO_ON)
    named = [word for word in choices if word in words]
    return named[0] if len(named) == 1 and named[0] != GO_ON else ""


@dataclass
class Debate(ProgramTalk):
    """A debate of agents named `affirmative`, `negative`, `moderator` and `judge`; the task's
    prompt is what the affirmative side is asked first.

    Args:
        rounds: further rounds of both sides after the first, while the moderator goes on.
        fields: of the prompts: `rules` (what a reply looks like) and `failures`.
        prompts: by name, see `PROMPTS`.
    """

    rounds: int = setting("further rounds of both sides after the first", 2, at_least=0)
    fields: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=lambda: PROMPTS)

    async def run(self, task: Task, team: Team) -> Output:
        latest: dict[str, Turn] = {}
        faults: dict[str, str] = {}
        for number in range(self.rounds + 1):
            for side in SIDES:
                turn = latest[side] = await self._speak(side, number, task, latest, team)
                faults[side] = await self.check(read_edit(turn.text), turn, team, dry_run_of(side))
            sound = [side for side in SIDES if not faults[side]]
            if len(sound) == 1:  # a broken proposal loses
                return self._end(sound[0], latest, team)
            if winner := verdict(str(await self._ask("moderator", "compare", latest, team))):
                return self._end(winner, latest, team)
        winner = verdict(str(await self._ask("judge", "decide", latest, team)), decisive=True)
        return self._end(winner or AFFIRMATIVE, latest, team)

    async def _speak(
        self, side: str, number: int, task: Task, latest: Mapping[str, Turn], team: Team
    ) -> Turn:
        """A side's answer in a round: to the task at first, then to the other side's latest."""
        if side == AFFIRMATIVE and not number:
            return await team[side].fresh().reply(task.prompt, saw_gold=True)
        other = latest[NEGATIVE if side == AFFIRMATIVE else AFFIRMATIVE]
        name = "again" if number else "disagree"
        text = self._prompt(name, {"other": other.text})
        return await team[side].fresh().reply(text, reads=[other], saw_gold=True)

    def _prompt(self, name: str, fields: Mapping[str, str]) -> str:
        return render(self.prompts[name], {**self.fields, **fields}, setting=f"prompts.{name}")

    async def _ask(self, agent: str, prompt: str, latest: Mapping[str, Turn], team: Team) -> Turn:
        text = self._prompt(prompt, {side: turn.text for side, turn in latest.items()})
        return await team[agent].fresh().reply(text, reads=[*latest.values()], saw_gold=True)

    def _end(self, winner: str, latest: Mapping[str, Turn], team: Team) -> Output:
        team.record(VERDICT, winner, reads=[*latest.values()])
        return Output(latest[winner].text, (latest[winner],))


def dry_run_of(side: str) -> str:
    """The name of the operation that says why a side's proposal cannot be run."""
    return f"{DRY_RUN} {side}"


def outcome(episode: Episode) -> tuple[str, dict[str, Proposal]]:
    """(the winning side, the last proposal of each side) of a debate; without a winner the debate
    could not be held, and the affirmative side's proposal is lost with the reason."""
    winner = next((o.text for o in episode.operations if o.name == VERDICT), "")
    if episode.error is not None or not winner:
        fault = f"reply: {episode.error or 'no verdict'}"
        return AFFIRMATIVE, {AFFIRMATIVE: Proposal("", fault=fault, proposer=AFFIRMATIVE)}
    last = {turn.agent: turn.text for turn in episode.turns}
    proposals = (checked(read_edit(last[side]), episode, dry_run_of(side)) for side in SIDES)
    return winner, {
        side: dataclasses.replace(proposal, proposer=side)
        for side, proposal in zip(SIDES, proposals, strict=True)
    }
