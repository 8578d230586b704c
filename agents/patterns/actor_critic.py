"""Actor and critic: one answers, one judges, one says what is wrong, and the first tries again.

After the actor-critic setting of SiriuS (Zhao et al., arXiv 2502.04780): judge and critic see task
and answer, never the gold answer, and the actor answers again from its own answer and the feedback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.templates import render
from ..types import SettingError, Task

_VERDICT = re.compile(r"\bverdict\b[\s:*_`\"'-]*(right|wrong)\b", re.IGNORECASE)

JUDGE = (
    "{prompt}\n\nAn answer to this:\n{answer}\n\nIs the answer right or wrong? "
    'End with a line that says "Verdict: right" or "Verdict: wrong".'
)
CRITIC = (
    "{prompt}\n\nAn answer to this:\n{answer}\n\nIt was judged wrong. "
    "Say where it goes wrong and how to do better; do not answer yourself."
)
RETRY = "Your answer was judged wrong. Feedback:\n{feedback}\n\nAnswer the task again."


def verdict(text: str) -> bool | None:
    """True if the text judges "right", False if "wrong", None if it does neither.

    The last "Verdict: right" or "Verdict: wrong" counts; a text that is nothing but one of the two
    words does too.
    """
    verdicts = [word.lower() for word in _VERDICT.findall(text)]
    word = verdicts[-1] if verdicts else text.strip().strip("*_`\"'.!").lower()
    return {"right": True, "wrong": False}.get(word)


@trusted("system")
@dataclass
class ActorCritic(System):
    """Two or three agents; their order says who is who: actor, judge, critic. Of two, the judge's
    own words are the feedback.

    Each of at most `max_rounds` rounds is a verdict and, if that is "wrong", feedback and a new
    answer (so the last answer may be unjudged). A verdict that cannot be read leaves the answer
    standing. The actor's chat goes on; judge and critic start afresh each round. The output is the
    actor's last text.
    """

    max_rounds: int = setting("verdicts, each with feedback and a new answer", 2, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) not in (2, 3):
            raise SettingError(
                "ActorCritic: two or three agents expected (actor, judge, critic), got"
                f" {len(self.specs)}"
            )

    async def run(self, task: Task, team: Team) -> str:
        actor, judge, *critics = team
        answer = await actor.reply(task.prompt)
        for _ in range(self.max_rounds):
            fields = {"prompt": task.prompt, "answer": answer.text}
            feedback = await judge.fresh().reply(
                render(JUDGE, fields, setting="judge"), reads=[answer]
            )
            if verdict(feedback.text) is not False:
                break
            for critic in critics:
                feedback = await critic.fresh().reply(
                    render(CRITIC, fields, setting="critic"), reads=[answer]
                )
            retry = render(RETRY, {"feedback": feedback.text}, setting="retry")
            answer = await actor.reply(retry, reads=[feedback])
        return answer.text
