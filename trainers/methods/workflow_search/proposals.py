"""Proposals: programs that a helper writes for a `Program` team, read strictly and dry-run in the
sandbox, never in this process."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from ....agents.execution import program_in
from ....agents.programs.program import Program
from ....agents.programs.restrictions import parsed
from ....agents.system import System
from ....agents.team import Team
from ....agents.types import SettingError, Task, Turn
from ....rollouts.types import Episode

DRY_RUN = "dry run"  # the operation that says why a proposal cannot be run


@dataclass(frozen=True)
class Proposal:
    """A program that a helper proposed.

    Args:
        note: what it changes, in the helper's words; of a reply that cannot be read its beginning.
        program: prompts as constants, then the calls; "" if the reply held none.
        fault: why it is lost, "" if it can be run.
        proposer: the helper.
    """

    note: str
    program: str = ""
    fault: str = ""
    proposer: str = "proposer"


@dataclass
class ProgramTalk(System):
    """Base of talks whose replies hold programs for `target`."""

    target: Program | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise SettingError(f"{type(self).__name__}(target=...): expected a Program")

    async def check(self, proposal: Proposal, turn: Turn, team: Team, name: str = DRY_RUN) -> str:
        """Dry-run a proposal and record what is wrong with it; returns the fault."""
        assert self.target is not None
        fault = proposal.fault or await self.target.dry_run(proposal.program, team)
        team.record(name, proposal.program, reads=[turn], error=fault)
        return fault


@dataclass
class Edit(ProgramTalk):
    """One agent, which is asked for one edit of a program (AFlow)."""

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        turn = await agent.reply(task.prompt, saw_gold=True)
        await self.check(read_edit(turn.text), turn, team)
        return turn


def proposal_of(episode: Episode) -> Proposal:
    """The proposal of an `Edit`, with the fault that its dry run showed."""
    if episode.error is not None or episode.output is None:
        return Proposal("", fault=f"reply: {episode.error or 'none'}")
    return checked(read_edit(episode.output), episode)


def checked(proposal: Proposal, episode: Episode, name: str = DRY_RUN) -> Proposal:
    """The proposal with the fault of its last dry run in a talk."""
    faults = [each.error for each in episode.operations if each.name == name]
    return Proposal(proposal.note, proposal.program, faults[-1] if faults else "dry run: none")


def read_edit(reply: str) -> Proposal:
    """The fields `modification`, `graph` and `prompt` of a reply, each between tags of its name; of
    several pairs the last. `prompt` may be empty, but not missing."""
    fields = {name: field_of(reply, name) for name in ("modification", "graph", "prompt")}
    missing = [name for name, text in fields.items() if text is None]
    modification = " ".join((fields["modification"] or "").split())
    if not missing and not modification:
        missing = ["modification"]
    if missing:
        return Proposal(modification or reply[:200], fault=f"missing: <{missing[0]}>")
    graph, prompts = program_in(fields["graph"] or ""), program_in(fields["prompt"] or "")
    program = "\n\n".join(part.strip("\n") for part in (prompts, graph) if part.strip())
    return Proposal(modification, program)


def field_of(reply: str, name: str) -> str | None:
    """What stands between the last `<name>` and the `</name>` after it; None without a pair."""
    closed, end, _ = reply.rpartition(f"</{name}>")
    _, start, text = closed.rpartition(f"<{name}>")
    return text.strip("\n") if start and end else None


def split_prompts(program: str) -> tuple[str, str]:
    """(prompts, graph): the lines up to the last of the texts that a valid program assigns to names
    before anything else, and the rest."""
    last = 0
    for node in parsed(program).body:
        simple = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if not simple or not isinstance(node.value.value, str):  # type: ignore[attr-defined]
            break
        last = node.end_lineno or last
    lines = program.splitlines()
    return "\n".join(lines[:last]), "\n".join(lines[last:]).strip("\n")
