"""The diagnoser: a model that is shown a team's whole episode and the right answer, and says
whether one module caused the error (LLMSelector, arXiv:2502.14815).

It sees the gold answer, so its turns are never trained on. Wording and format of the decision are
those of the authors' code; modules go by their agents' names there too, since an agent may speak
more than once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ....agents.system import System
from ....agents.team import Team
from ....agents.text.templates import render
from ....agents.types import Task, Turn
from ....rollouts.types import Episode

GUILTY, INNOCENT, UNREAD = 1.0, 0.0, 0.5
DIAGNOSE = """You are an expert in troubleshooting multi-module AI systems.

[Compound AI system]: "{system}"
[question]: {prompt}
{outputs}
[The compound system's output]: {output}
[The desired correct answer]: {answer}

Your task
Determine whether MODULE {module} is responsible for the discrepancy between the system's final \
output and the desired (ground-truth) answer.

Guidelines
Take the desired answer as absolutely correct. Do not attempt to solve any subtasks yourself. \
Reason step by step first, and then give the final answer in the following format.

Decision format
If MODULE {module} is the likely source of the error, output exactly: [final answer: Yes]
If the error is more plausibly due to another module, output exactly: [final answer: No]
If the final output already matches the desired answer, output exactly: [correct answer]"""


@dataclass
class Diagnosis(System):
    """One agent, the diagnoser, which answers the task's prompt; the output is its text."""

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        return await agent.reply(task.prompt, saw_gold=True)


def diagnosis_task(episode: Episode, module: str, system: System) -> Task:
    """What the diagnoser is asked about one module of an episode."""
    spoken = [turn for turn in episode.turns if turn.taken]
    outputs = [f'[Module {turn.agent}\'s output]: "{turn.text}"' for turn in spoken]
    fields = {
        "system": description(system),
        "prompt": episode.task.prompt,
        "outputs": "\n".join(outputs),
        "output": episode.output,
        "answer": episode.task.answer,
        "module": module,
    }
    prompt = render(DIAGNOSE, fields, setting="diagnoser")
    return Task(f"{episode.id}/{module}", prompt)


def description(system: System) -> str:
    """A system in a line: its class, and its agents with their roles."""
    agents = [spec.name + (f" ({spec.role})" if spec.role else "") for spec in system.specs]
    return f"{type(system).__name__} of {', '.join(agents)}"


def verdict(text: str) -> float:
    """Whether a diagnosis says that the module caused the error: 1 yes, 0 no or that the answer is
    right, 0.5 if it cannot be read. Case and punctuation do not matter."""
    plain = re.sub(r"[^\w]", "", text).lower()
    if "finalansweryes" in plain:
        return GUILTY
    return INNOCENT if "finalanswerno" in plain or "correctanswer" in plain else UNREAD
