"""DebFlow: AFlow whose edits come of a debate (Su et al., arXiv:2503.23781).

A round draws its parent, measures and converges as AFlow's (`aflow.py`). The edit is what wins a
debate (`debate.py`): the affirmative side proposes as AFlow's proposer does; the negative side,
which does not see the experience, proposes another; the moderator names the better or goes on, for
`debate_rounds` further rounds; then the judge decides. Helpers: `affirmative`, `negative`,
`moderator` and `judge`. The losing side's last proposal is kept in the archive, not measured; it is
taken up if a later debate proposes the same program.

Against the authors' code (commit be7b496): a verdict is read by its one keyword, not by equality of
the whole reply, and one that names no side goes on; a proposal that cannot be run loses without a
moderator's word; the moderator's last verdict counts, where that code asks the judge whatever it
was; where the judge names no side either, the affirmative one wins. Not found in that
code and not here: a call of its own that reflects on failures.

accelerate launch recipes/debflow.py [--config recipes/debflow.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....agents.programs.program import PROGRAM
from ....agents.settings import setting
from ....agents.text.templates import render
from ....agents.types import Task
from ...config import RunConfig
from ...feedback.helpers import prompts_of
from ...values.search import Candidate
from .aflow import EditSearchConfig, EditSearchTrainer
from .debate import AFFIRMATIVE, NEGATIVE, PROMPTS, SIDES, Debate, outcome
from .measurement import MeasurementConfig
from .proposals import Proposal

HELPERS = (*SIDES, "moderator", "judge")
RULES = """The program calls these functions of language models:

{operators}

`problem` holds the text of the problem; the value of the last line, an expression, is the answer; \
at most {max_nodes} calls of functions may stand in it. Make one single modification of at most \
five lines. Reply with three fields, each complete: what is changed and why, the whole program \
without its constants, and all constants, one `NAME = "text"` a line:
<modification>...</modification>
<graph>...</graph>
<prompt>...</prompt>"""


@dataclass
class DebFlowConfig(EditSearchConfig, MeasurementConfig, RunConfig):
    """`RunConfig` with a search by edits and a debate. lambda and alpha are the released code's."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/debflow"
    )
    uniform: float = setting(
        "share of the draw in which all are equal (lambda)", 0.3, at_least=0, at_most=1
    )
    sharpness: float = setting("weight of a point in percent (alpha)", 0.2, at_least=0)
    debate_rounds: int = setting(
        "further rounds of both sides after the first; the released code has 2, later 3",
        2,
        at_least=0,
    )
    prompts: dict | str | None = setting(
        "by name: prompts that stand in for the debate's own: disagree, again (fields: rules,"
        " failures, other), compare, decide (rules, failures, affirmative, negative)",
        factory=dict,
    )

    def check(self) -> None:
        prompts_of(PROMPTS, self.prompts)


class DebFlowTrainer(EditSearchTrainer[DebFlowConfig]):
    """Searches for a program by debated edits. Arguments: see `Trainer`.

    side = {"url": "https://HOST/v1", "base": "MODEL", "key_env": "KEY"}
    helpers = {name: side for name in ("affirmative", "negative", "moderator", "judge")}
    trainer = DebFlowTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Program(["executor"]),
                             tasks="gsm8k", args=DebFlowConfig(helpers=helpers))
    trainer.train()
    """

    Config = DebFlowConfig

    def helper_names(self) -> Sequence[str]:
        return HELPERS

    def edit(self, parent: Candidate, label: str, refused: Sequence[str], step: int) -> Proposal:
        """What wins a debate; what loses is kept."""
        fields = self.fields(parent, refused)
        prompt = render(self.args.instruction, fields, setting="instruction")
        talk = Debate(
            [self.helper(name) for name in HELPERS],
            target=self.target,
            rounds=self.args.debate_rounds,
            fields={
                "rules": render(RULES, fields, setting="rules"),
                "failures": fields["failures"],
            },
            prompts=prompts_of(PROMPTS, self.args.prompts),
        )
        winner, proposals = outcome(self.run.rollouts.ask(talk, Task(label, prompt)))
        loser = proposals.get(NEGATIVE if winner == AFFIRMATIVE else AFFIRMATIVE)
        if loser is not None and loser.program and loser.program != proposals[winner].program:
            self._keep(loser, parent, step)
        return proposals[winner]

    def _keep(self, loser: Proposal, parent: Candidate, step: int) -> None:
        """Keep the losing proposal, unless its program is in the archive."""
        values = {PROGRAM: loser.program}
        if self.search.find(values) is None:
            by, note, fault = loser.proposer, loser.note, loser.fault
            kept = Candidate(values, by, note, fault, parents=(parent.id,), round=step)
            kept = self.search.add(kept)
            self.search.reject(kept.id, "lost the debate")
