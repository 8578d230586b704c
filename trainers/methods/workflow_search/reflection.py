"""ADAS's talks: a program is proposed, reflected on twice, and repaired after an error."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ....agents.execution import program_in
from ....agents.team import Team
from ....agents.types import Task, Turn
from ....rollouts.types import Episode
from .proposals import DRY_RUN, ProgramTalk, Proposal, checked

FORMAT = """Reply with one JSON object whose values are texts:
{"thought": ..., "name": ..., "code": ...}"""
NOVELTY = f"""Look at your proposal again. Is it interestingly new beside the archive, and not a \
variation of the last entry? Is anything in the code wrong? What would make it better? Then write \
it again, improved.
{FORMAT}
Add the key "reflection" with what you found."""
MISTAKES = f"""Check the code against these mistakes: an operator called without await; the answer \
of one problem written into the program; a result that is never used; a last line that is no \
expression; a list passed where a text is expected, or a text where a list is; a loop without an \
end. Then write it again, corrected.
{FORMAT}
Add the key "reflection" with what you found."""
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.DOTALL)


@dataclass
class Reflection(ProgramTalk):
    """One agent proposes a program and reflects on it twice in one chat (ADAS); each reply is a
    whole proposal, the last one counts, and one that cannot be read ends the talk."""

    novelty: str = NOVELTY
    mistakes: str = MISTAKES

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        for prompt in (task.prompt, self.novelty, self.mistakes):
            turn = await agent.reply(prompt, saw_gold=True)
            proposal = read_json(turn.text)
            if proposal.fault:
                break
        await self.check(proposal, turn, team)
        return turn


@dataclass
class Repair(ProgramTalk):
    """One agent, which is asked to write a program again after an error."""

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        turn = await agent.reply(task.prompt, saw_gold=True)
        await self.check(read_json(turn.text), turn, team)
        return turn


def read_talk(episode: Episode) -> Proposal:
    """The proposal of a `Reflection` or a `Repair`, with the fault that its dry run showed."""
    if episode.error is not None or episode.output is None:
        return Proposal("", fault=f"reply: {episode.error or 'none'}")
    return checked(read_json(episode.output), episode, DRY_RUN)


def read_json(reply: str) -> Proposal:
    """The proposal of a JSON reply: `name` and `thought` (of a repair `debug_thought`) are its
    note, `code` its program. Text around the object is no part of it."""
    data, fault = _object(reply)
    thought = data.get("thought") or data.get("debug_thought")
    for key, value in (
        ("thought", thought),
        ("name", data.get("name")),
        ("code", data.get("code")),
    ):
        if not fault and (not isinstance(value, str) or not value.strip()):
            fault = f"missing: {key!r} is no text in the reply's JSON"
    if fault:
        return Proposal(reply[:200], fault=fault)
    return Proposal(f"{data['name']}: {thought}", program_in(str(data["code"])))


def _object(reply: str) -> tuple[dict[str, Any], str]:
    """(the JSON object of a reply, why there is none)."""
    text = reply.strip()
    fenced = _FENCE.match(text)
    text = fenced[1] if fenced else text[text.find("{") : text.rfind("}") + 1]
    try:
        data = json.loads(text, strict=False)
    except ValueError as error:
        return {}, f"missing: no JSON object in the reply ({error})"
    if not isinstance(data, dict):
        return {}, f"missing: no JSON object in the reply, a {type(data).__name__}"
    return data, ""
