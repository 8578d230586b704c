"""Questions of a feedback method to its helpers: each an episode of its own (kind `aside`),
recorded, metered, and replayed on resume."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.system import System
from ...agents.team import Team
from ...agents.text.templates import render
from ...agents.types import SettingError, Task, Turn, nearest
from ..collection.rollout_manager import RolloutManager
from ..loop.spec import RunSpec

# what went wrong with replies and proposals, by name of the metric
UNANSWERED, TRUNCATED, UNREADABLE, REFUSED, UNCHANGED, COPIED = (
    "unanswered",  # no reply: the question did not fit, the episode failed
    "truncated",  # a reply that ended at its max_tokens
    "unreadable",  # a reply in another format
    "refused",  # a value that its param does not take, or that is too long
    "unchanged",  # a proposal of the value in force
    "copied",  # a value that holds a training task word for word
)


def prompts_of(own: Mapping[str, str], changed: Any) -> dict[str, str]:
    """A method's prompts by name, those of the mapping `changed` in place of some. Raises
    `SettingError` at a name that the method has no prompt of, and at a prompt that is no text."""
    for name, text in (changed or {}).items():
        if name not in own:
            raise SettingError(
                f"prompts.{name}: this method has no such prompt; {nearest(name, own)}"
            )
        if not isinstance(text, str):
            raise SettingError(f"prompts.{name}: expected a text, got {text!r:.60}")
    return {**own, **(changed or {})}


@dataclass
class Reply(System):
    """One helper that answers the task's prompt.

    Args:
        saw_gold: the prompt may hold a task's answer, so the turn is never trained on.
    """

    saw_gold: bool = False

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        return await agent.reply(task.prompt, saw_gold=self.saw_gold)


@dataclass(frozen=True)
class Question:
    """What a helper is asked.

    Args:
        helper: its name in the run's setting `helpers`.
        system: its system message, unless the setting gives it a `prompt`.
        text: the message.
        about: a few words that name the question in the store: `critic/task-3`.
        follows: id of the episode that it is about.
        saw_gold: the text may hold a task's answer.
        max_tokens, temperature: of the reply; None leaves the helper's, or the run's.
    """

    helper: str
    system: str
    text: str
    about: str
    follows: str = ""
    saw_gold: bool = False
    max_tokens: int | None = None
    temperature: float | None = None


class Helpers:
    """The helpers of a run, and the prompts that a method asks them with.

    Args:
        spec: knows the helpers by name.
        rollouts: plays their episodes.
        prompts: templates by name; `changed` stand in for some of them. Raises `SettingError` at
            a name that the method has no prompt of.

    `counts` counts, since it was cleared, what went wrong (`UNANSWERED`, `UNREADABLE`, ...).
    """

    def __init__(
        self,
        spec: RunSpec,
        rollouts: RolloutManager,
        prompts: Mapping[str, str],
        changed: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.rollouts = spec, rollouts
        self.prompts = prompts_of(prompts, changed)
        self.counts: Counter[str] = Counter()

    def check(self, *names: str) -> None:
        """Raise `SettingError` unless the run has helpers of these names."""
        for name in names:
            self.spec.helper(name)

    def prompt(self, name: str, **fields: str) -> str:
        """The method's prompt of this name, with its `{field}`s filled in."""
        return render(self.prompts[name], fields, setting=f"prompts.{name}")

    def ask(self, questions: Sequence[Question]) -> list[str | None]:
        """The replies, in order; None where there is none (counted): a prompt that does not fit
        the context, an episode that failed, or nothing said."""
        if not questions:
            return []
        asked = self.rollouts.ask_all([self._talk(question) for question in questions])
        replies: list[str | None] = []
        for episode in asked:
            empty = episode.failed or not (episode.output or "").strip()
            self.counts[UNANSWERED] += empty
            self.counts[TRUNCATED] += any(turn.finish_reason == "length" for turn in episode.turns)
            replies.append(None if empty else episode.output)
        return replies

    def _talk(self, question: Question) -> tuple[System, Task, str]:
        agent = self.spec.helper(question.helper)
        if not agent.prompt:
            agent = dataclasses.replace(agent, prompt=question.system)
        changed = {
            name: value
            for name in ("max_tokens", "temperature")
            if (value := getattr(question, name)) is not None
        }
        if changed:
            sampling = agent.sampling or self.spec.config.sampling()
            agent = dataclasses.replace(agent, sampling=dataclasses.replace(sampling, **changed))
        talk = Reply([agent], saw_gold=question.saw_gold)
        return talk, Task(question.about, question.text), question.follows
