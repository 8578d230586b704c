"""Self-correction of one turn: a critic that sees the answer writes feedback, the agent writes its
turn again with it, then rewrites that without traces of the correction.

The augmentation of SiriuS (Zhao et al., arXiv 2502.04780). It is played as an episode of its own,
on the task of `correction_task`; the output is a text for the ORIGINAL prompt of the turn. Turns
whose prompt holds the answer, or a text that follows from it, are marked `saw_gold`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..lookup import trusted
from ..system import System
from ..team import Team
from ..text.templates import fields_in, render
from ..types import CORRECTION_SPLIT, SettingError, Task, Turn

FEEDBACK = (
    "A team works on this task:\n{prompt}\n\nThe reference answer is: {answer}\n\nThe team's answer"
    " is wrong. What was said:\n{transcript}\n\nSay what {agent} should do differently, in a few"
    " sentences. Judge {agent} only, and do not tell the answer."
)
REGENERATE = (
    "{told}\n\nYou wrote:\n{said}\n\nFeedback on it:\n{feedback}\n\nWrite a corrected version, and"
    " nothing else."
)
REPHRASE = (
    "Rewrite the text below as if it had been written in one go: no hint that it was corrected,"
    " nothing new, the same form.\n\n{text}"
)
_TASK = ("prompt", "told", "said", "agent", "transcript", "answer")


@trusted("system")
@dataclass
class SelfCorrection(System):
    """Two agents: a critic, and the one whose turn is corrected. The output is the corrected text.

    Args:
        feedback, regenerate, rephrase: the prompts of the three steps, as templates; "" leaves the
            step out (without `regenerate` the text to rephrase is `{said}`). Fields: `prompt` (the
            team's task), `told` and `said` (the turn's last message and its text), `agent` (its
            agent), `transcript` (all turns of the team); in `feedback` also `answer`, in
            `regenerate` `feedback`, in `rephrase` `text`.
    """

    feedback: str = FEEDBACK
    regenerate: str = REGENERATE
    rephrase: str = REPHRASE

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) != 2:
            raise SettingError(
                "SelfCorrection: two agents expected (the critic, the agent that is corrected), got"
                f" {len(self.specs)}"
            )
        open_ = [field for field in _TASK if field != "answer"]
        for name, more in (
            ("feedback", "answer"),
            ("regenerate", "feedback"),
            ("rephrase", "text"),
        ):
            known = dict.fromkeys(
                [*open_, *([more] if name != "regenerate" or self.feedback else [])], ""
            )
            render(getattr(self, name), known, setting=name)
        if not self.regenerate and (self.feedback or not self.rephrase):
            raise SettingError(
                "regenerate: empty, so there is nothing that feedback could change, or no step at"
                " all is left"
            )

    async def run(self, task: Task, team: Team) -> str:
        critic, agent = team
        known = {field: str(task.meta[field]) for field in _TASK if field != "prompt"} | {
            "prompt": task.prompt
        }
        last: Turn | None = None  # the turn whose text is `feedback`, then `text`
        gold = False  # does that text follow from the answer?
        known["text"] = known["said"]
        if self.feedback:
            prompt = render(self.feedback, known, setting="feedback")
            last, gold = await critic.reply(prompt, saw_gold=True), True
            known["feedback"] = last.text
        for name, template in (("regenerate", self.regenerate), ("rephrase", self.rephrase)):
            if template:
                quotes = {"feedback", "text"} & {*fields_in(template, setting=name)}
                reads = [last] if last is not None and quotes else []
                gold = gold and bool(reads)
                prompt = render(template, known, setting=name)
                last = await agent.fresh().reply(prompt, reads=reads, saw_gold=gold)
                known["text"] = last.text.strip()
        return known["text"]


def correction_task(task: Task, turn: Turn, turns: tuple[Turn, ...], text: str = "") -> Task:
    """The task of correcting `turn` of an episode on `task`: here the answer is public, and the
    system marks the turns that see it.

    `text` is the text to start from, if it is not the turn's own.
    """
    prompt = next((m.content for m in reversed(turn.messages) if m.role == "user"), "")
    meta = {
        "told": prompt,
        "said": text or turn.text,
        "agent": turn.agent,
        "answer": str(task.answer),
        "transcript": "\n\n".join(f"[{t.agent}] {t.text}" for t in turns if t.taken),
    }
    return Task(task.id, task.prompt, None, task.source, CORRECTION_SPLIT, meta)
