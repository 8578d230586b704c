"""ADAS: Meta Agent Search, a search that invents programs beside a whole archive (Hu et al.,
arXiv:2408.08435).

The archive begins with seven programs of ours (`seeds.py`) beside the team's own. In a generation a
helper (`helpers: {proposer: ...}`) sees every program that was measured, with its name, thoughts
and fitness (`fitness.py`), and proposes another, which it reflects on twice in the same chat:
whether it is new, and whether it holds a typical mistake. A program that cannot be run, or whose
score is below `min_score`, is repaired after the error's words, up to `attempts` measurements in
all. The proposer never sees a task or an answer. Every program with a score stays; the best by
validation is the team's.

Against the authors' code: a program enters with its own scores or not at all, so what a repair
replaces is lost with its reason, and the reply to a last error, which nobody would measure, is not
asked for; a repair is a talk of its own that shows the program and the error; bootstrap intervals
are 2.5 % to 97.5 % everywhere; programs run in the sandbox, with bounds per task. Its `forward` is
a program of operators here. A second proposal of a program is a duplicate and ends the generation.

accelerate launch recipes/adas.py [--config recipes/adas.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....agents.programs.program import PROGRAM
from ....agents.settings import setting
from ....agents.text.templates import render
from ....agents.types import SettingError, Task
from ...config import RunConfig
from ...feedback.helpers import prompts_of
from ...values.search import Candidate
from ...values.selection import whole_archive
from .fitness import fitness
from .measurement import MeasurementConfig
from .proposals import Proposal
from .reflection import FORMAT, MISTAKES, NOVELTY, Reflection, Repair, read_talk
from .seeds import NEEDS, SEEDS
from .workflow_search import WorkflowSearchConfig, WorkflowSearchTrainer

INVENT = """You design programs that answer problems of one kind: {role}. A program calls these \
functions of language models:

{operators}

`problem` holds the text of the problem, and every function sees it. The value of the last line, \
an expression, is the answer. Loops, conditions, asyncio.gather and functions of your own are \
allowed; imports of other modules and files are not; at most {max_nodes} calls of functions may \
stand in a program.

The archive of programs so far, with their fitness:
{archive}

Think out of the box: propose the next program, one that is interestingly new and likely to have a \
higher fitness. Learn from the archive, and from research on agents and prompting that you know.
{format}"""
REPAIR = """A program calls these functions of language models:

{operators}

The value of its last line, an expression, is the answer. This program went wrong:

{program}

The error: {fault}

Think about where it went wrong, also in the light of earlier mistakes of this kind, then write it \
again.
{format}
Put your thoughts on the error under the key "debug_thought"."""
PROMPTS = {"invent": INVENT, "repair": REPAIR, "novelty": NOVELTY, "mistakes": MISTAKES}


@dataclass
class ADASConfig(WorkflowSearchConfig, MeasurementConfig, RunConfig):
    """`RunConfig` with a search over programs, the start of the archive and the repair loop."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/adas"
    )
    max_steps: int = setting("generations: programs that are invented", 30, at_least=1)
    num_val_tasks: int = setting(
        "tasks cut from the training ones, on which programs are compared", 128, at_least=1
    )
    seeds: list[str] = setting(
        "programs that the archive begins with, beside the team's own",
        factory=lambda: list(SEEDS),
        choices=tuple(SEEDS),
    )
    attempts: int = setting("measurements of a generation, repairs included", 3, at_least=1)
    min_score: float = setting("a lower score is a mistake to be repaired", 0.01, at_least=0)
    prompts: dict | str | None = setting(
        "by name: prompts that stand in for the method's own: invent (fields: role, operators,"
        " archive, best, max_nodes, format), repair (role, operators, program, fault, max_nodes,"
        " format), novelty and mistakes (no fields)",
        factory=dict,
    )

    def check(self) -> None:
        prompts_of(PROMPTS, self.prompts)


class ADASTrainer(WorkflowSearchTrainer[ADASConfig]):
    """Invents programs beside an archive. Arguments: see `Trainer`.

    proposer = {"url": "https://HOST/v1", "base": "MODEL", "key_env": "KEY"}
    trainer = ADASTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Program(["executor"]),
                          tasks="gsm8k", args=ADASConfig(helpers={"proposer": proposer}))
    trainer.train()
    """

    Config = ADASConfig

    def starts(self) -> Sequence[Proposal]:
        """The team's own program, and the seeds."""
        known = self.target.callable
        for name in self.args.seeds:
            missing = sorted(set(NEEDS[name]) - set(known))
            fault = self.target.fault(SEEDS[name])
            if missing or fault:
                why = f"it calls {missing[0]!r}, which is no operator here" if missing else fault
                raise SettingError(f"seeds: {name!r} cannot be used: {why}; leave it out")
        seeds = [Proposal(name, SEEDS[name]) for name in self.args.seeds]
        return [*super().starts(), *seeds]

    def propose(self, step: int) -> Candidate | None:
        """A generation: a proposal, and its repairs."""
        archive = self.search.select(whole_archive)
        prompts = prompts_of(PROMPTS, self.args.prompts)
        talk = Reflection(
            [self.helper("proposer")],
            target=self.target,
            novelty=prompts["novelty"],
            mistakes=prompts["mistakes"],
        )
        asked = Task(f"generation-{step}", self._invented(archive))
        proposal = read_talk(self.run.rollouts.ask(talk, asked))
        candidate = self.enter(proposal, archive, step)
        for attempt in range(1, self.args.attempts + 1):
            if candidate is None or not candidate.values:
                return candidate
            candidate = self._judged(candidate)
            if not candidate.fault or attempt == self.args.attempts:
                return candidate
            repair = Repair([self.helper("proposer")], target=self.target)
            asked = Task(f"generation-{step}-repair-{attempt}", self._repaired(candidate))
            proposal = read_talk(self.run.rollouts.ask(repair, asked))
            proposal = dataclasses.replace(proposal, proposer="repair")
            candidate = self.enter(proposal, [candidate], step)
        return candidate

    def _judged(self, candidate: Candidate) -> Candidate:
        """The candidate, measured; lost if its score is too low."""
        candidate = self.measure(candidate)
        if candidate.fault or candidate.mean >= self.args.min_score:
            return candidate
        why = f"score: {candidate.mean:.4f} is below {self.args.min_score:g}: all answers are wrong"
        return self.search.lose(candidate.id, why)

    def _invented(self, archive: Sequence[Candidate]) -> str:
        best = str(self.search.best().values[PROGRAM])
        fields = {**self._fields(), "archive": self.shown(archive), "best": best}
        return self._prompt("invent", fields)

    def _repaired(self, candidate: Candidate) -> str:
        values = {"program": candidate.values[PROGRAM], "fault": candidate.fault}
        return self._prompt("repair", {**self._fields(), **values})

    def _prompt(self, name: str, fields: Mapping[str, str]) -> str:
        template = prompts_of(PROMPTS, self.args.prompts)[name]
        return render(template, fields, setting=f"prompts.{name}")

    def _fields(self) -> dict[str, str]:
        return {
            "role": next((spec.role for spec in self.target.specs if spec.role), "see below"),
            "operators": "\n".join(f"- {each}" for each in self.target.callable.values()),
            "max_nodes": str(self.target.max_nodes),
            "format": FORMAT,
        }

    def shown(self, archive: Sequence[Candidate]) -> str:
        """The archive as JSON, without tasks, answers and faults."""
        entries = []
        for candidate in archive:
            name, _, thought = candidate.note.partition(": ")
            entry = {
                "name": name,
                "thought": thought,
                "code": candidate.values[PROGRAM],
                "generation": candidate.round or "initial",
                "fitness": str(fitness([*candidate.scores.values()], self.args.seed)),
            }
            entries.append(entry)
        return json.dumps(entries, indent=1, ensure_ascii=False)
