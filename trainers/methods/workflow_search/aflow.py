"""AFlow: a search over programs that edits one program at a time (Zhang et al., arXiv:2410.10762).

A round draws a parent among the first program and the best others (soft mixed selection, scores in
percent), shows a helper (`helpers: {proposer: ...}`) the parent with its prompts, its score, what
was tried from it before and some tasks that it failed, and asks for one edit: the modification in
words, the program (`graph`) and its prompts. An edit that was tried from this parent already, in
the same words, and a program that is in the archive already, are refused and asked for anew, the
parent drawn again, `tries` times in all. Every program that answers stays selectable. The search
ends with the rounds, or once the mean of the three best did not change for five rounds.

Against the authors' code: programs run in the sandbox and never in this process; a round that fails
is recorded with its reason, shown as experience and not repeated; a reply without one of its three
fields is lost with that reason; draws follow from the seed. `uniform` and `sharpness` are the
paper's, that code has 0.3 and 0.2. With `sample` 1 the first program is the only parent, where that
code adds the best other.

accelerate launch recipes/aflow.py [--config recipes/aflow.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ....agents.programs.program import PROGRAM
from ....agents.settings import setting
from ....agents.text.templates import render
from ....agents.types import Task
from ...config import RunConfig
from ...values.search import Candidate
from ...values.selection import soft_mixed
from .convergence import converged
from .experience import experience, failures, same_edit
from .measurement import MeasurementConfig
from .proposals import Edit, Proposal, proposal_of, split_prompts
from .workflow_search import WorkflowSearchConfig, WorkflowSearchTrainer

EDIT = """You improve a Python program, called the graph, and its prompts, which together answer \
problems of one kind: {role}. The program answers a problem by calling these functions:

{operators}

`problem` holds the text of the problem, and every function sees it. The value of the last line, \
an expression, is the answer. Loops, conditions, asyncio.gather and functions of your own are \
allowed; imports of other modules, files and new functions of a language model are not.

This is the program to go on from:
<graph>
{graph}
</graph>
<prompt>
{prompts}
</prompt>

{experience}
{refused}
Problems that it failed:
{failures}

Make one single modification, of at most five lines, and at most {max_nodes} calls of functions in \
the program. Think of critical methods such as review and revise, an ensemble of several answers \
from different prompts, or self-ask. Prompts are constants that the program refers to by name. \
Reply with three fields, each complete: what you change and why, the whole program without the \
constants, and all constants, one `NAME = "text"` a line:
<modification>...</modification>
<graph>...</graph>
<prompt>...</prompt>"""


@dataclass
class EditSearchConfig(WorkflowSearchConfig):
    """`WorkflowSearchConfig` with the choice of parents and what the proposer is shown."""

    sample: int = setting(
        "programs that a parent is drawn among: the first and the best others", 4, at_least=1
    )
    uniform: float = setting(
        "share of the draw in which all are equal (lambda)", 0.2, at_least=0, at_most=1
    )
    sharpness: float = setting("weight of a point in percent (alpha)", 0.4, at_least=0)
    tries: int = setting("proposals in a round until one is no duplicate", 3, at_least=1)
    max_failures: int = setting("failed tasks that the proposer is shown", 3, at_least=0)
    converged_top: int = setting("best programs whose mean says convergence", 3, at_least=1)
    converged_rounds: int = setting(
        "measured rounds without a change of that mean that end the search; 0: never", 5, at_least=0
    )
    instruction: str = setting(
        "the proposer's prompt; fields: role, operators, graph, prompts, experience, refused,"
        " failures, max_nodes",
        EDIT,
    )


@dataclass
class AFlowConfig(EditSearchConfig, MeasurementConfig, RunConfig):
    """`RunConfig` with a search by edits."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/aflow"
    )


C = TypeVar("C", bound=Any)  # an EditSearchConfig that is a RunConfig too


class EditSearchTrainer(WorkflowSearchTrainer[C]):
    """Base of AFlow and DebFlow: one edit of one parent per round."""

    def propose(self, step: int) -> Candidate | None:
        """An edit of a parent, drawn anew at every duplicate."""
        args, refused = self.args, list[str]()
        select = soft_mixed(args.sample, args.uniform, args.sharpness)
        for attempt in range(args.tries):
            (parent,) = self.search.select(select)
            proposal = self.edit(parent, f"round-{step}-{attempt}", refused, step)
            if candidate := self._entered(proposal, parent, step):
                return self.measure(candidate)
            refused.append(proposal.note)
        return None

    def edit(self, parent: Candidate, label: str, refused: Sequence[str], step: int) -> Proposal:
        """An edit of this parent. `refused`: notes of the round's duplicates so far."""
        talk = Edit([self.helper("proposer")], target=self.target)
        prompt = self.instructed(parent, refused)
        return proposal_of(self.run.rollouts.ask(talk, Task(label, prompt)))

    def _entered(self, proposal: Proposal, parent: Candidate, step: int) -> Candidate | None:
        """The proposal in the archive; None for a duplicate."""
        tried = [c for c in self.search.children(parent.id) if c.scores or c.fault]
        if proposal.program and any(same_edit(proposal.note, c.note) for c in tried):
            self.search.duplicates += 1
            return None
        return self.enter(proposal, [parent], step)

    def instructed(self, parent: Candidate, refused: Sequence[str] = ()) -> str:
        """What the proposer is asked."""
        return render(self.args.instruction, self.fields(parent, refused), setting="instruction")

    def fields(self, parent: Candidate, refused: Sequence[str] = ()) -> dict[str, str]:
        """The fields of a proposer's prompt."""
        prompts, graph = split_prompts(str(parent.values[PROGRAM]))
        again = "".join(f"- Proposed in this round already: {note}\n" for note in refused)
        return {
            "role": next((spec.role for spec in self.target.specs if spec.role), "see below"),
            "operators": "\n".join(f"- {each}" for each in self.target.callable.values()),
            "graph": graph,
            "prompts": prompts,
            "experience": experience(parent, self.search.children(parent.id)),
            "refused": again,
            "failures": self._failures(parent),
            "max_nodes": str(self.target.max_nodes),
        }

    def _failures(self, parent: Candidate) -> str:
        tasks, probe = self.tasks, self.args.probe
        episodes = [*self.played(parent, tasks[:probe]), *self.played(parent, tasks[probe:])]
        rng = self.search.rng()
        return failures(tasks, episodes, parent.scores, self.args.max_failures, rng) or "none"

    def ended(self) -> str:
        """Convergence: the mean of the best did not change for some rounds."""
        args = self.args
        if not args.converged_rounds:
            return ""
        means = [each.mean for each in self.search.pool()]
        span = converged(means, args.converged_top, args.converged_rounds)
        return f"converged: the {args.converged_top} best did not change" if span else ""


class AFlowTrainer(EditSearchTrainer[AFlowConfig]):
    """Searches for a program by edits. Arguments: see `Trainer`.

    proposer = {"url": "https://HOST/v1", "base": "MODEL", "key_env": "KEY"}
    trainer = AFlowTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Program(["executor"]),
                           tasks="gsm8k", args=AFlowConfig(helpers={"proposer": proposer}))
    trainer.train()
    """

    Config = AFlowConfig
