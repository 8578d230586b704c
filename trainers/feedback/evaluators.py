"""Evaluators: what is said of an episode's output before anything flows backward: a rule's words, a
judge's, or those of several judges with a role each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ...agents.text.tags import block
from ...agents.types import Reward
from ...rollouts.types import Episode
from ..credit.leakage import answer_spellings
from .helpers import Helpers, Question

FAILED = "The run ended with an error: {error}"
OPERATION_FAILED = "Operation {name!r} failed: {error}"


@dataclass(frozen=True)
class Judgement:
    """What an evaluator said of one episode.

    Args:
        score: of the run's metric; NaN if it could not be scored.
        text: in words. "" says nothing, and nothing flows.
        conversation: how it came to that, as blocks.
        saw_gold: it may hold the task's answer.
        parts: the texts of several judges, by role.
    """

    score: float
    text: str
    conversation: str = ""
    saw_gold: bool = False
    parts: tuple[tuple[str, str], ...] = ()


class Evaluator(Protocol):
    """Says in words how good outputs are."""

    def judge(self, helpers: Helpers, episodes: Sequence[Episode]) -> list[Judgement]:
        """One judgement per episode, in order."""


@dataclass(frozen=True)
class RuleWords:
    """The rewards' own words, or the metric's value with what the metric measures, and errors of
    the run and of its operations; no call.

    Args:
        metric: the reward whose value is the score.
        purpose: a sentence on what it measures.
        show_answer: also say the task's answer.
    """

    metric: str
    purpose: str = ""
    show_answer: bool = True

    def judge(self, helpers: Helpers, episodes: Sequence[Episode]) -> list[Judgement]:
        return [self._judgement(episode) for episode in episodes]

    def _judgement(self, episode: Episode) -> Judgement:
        score = score_of(episode, self.metric)
        gold = answer_spellings(episode.task)[:1] if self.show_answer else []
        lines = [_reward_words(reward) for reward in episode.rewards if reward.agent is None]
        if episode.failed:
            lines = [FAILED.format(error=episode.error or "no output")]
        lines += [
            OPERATION_FAILED.format(name=each.name, error=each.error)
            for each in episode.operations
            if each.error
        ]
        lines += [f"The expected output is: {gold[0]}"] if gold else []
        blocks = [block("PURPOSE", self.purpose)] if self.purpose else []
        blocks += [*case_blocks(episode), block("RESULT", "\n".join(lines))]
        return Judgement(score, "\n".join(lines), "\n".join(blocks), bool(gold))


@dataclass(frozen=True)
class Judges:
    """Helpers that read the task and the output and say what is wrong: one, or one per role.

    Several are asked at once and do not see each other; what they say is joined in the order of
    their roles, each under its name. One that gives no answer does not drop the others.

    Args:
        metric: the reward whose value is the score.
        helper: its name. roles: "" is a judge without a role.
        criteria: by role, what it looks at; a role that is missing is its own criterion.
        max_tokens: of all judges of an output together, shared evenly; 0: the helper's own bound.
        show_answer: a judge is shown the task's answer.

    Prompts: `judge_system` and `judge` with `{role}` and `{criterion}`; `judge` with `{case}`
    (blocks) too.
    """

    metric: str
    helper: str = "evaluator"
    roles: tuple[str, ...] = ("",)
    max_tokens: int = 0
    show_answer: bool = False
    criteria: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> int | None:
        """Tokens of one judge: floor(max_tokens / number of judges)."""
        return self.max_tokens // len(self.roles) if self.max_tokens else None

    def judge(self, helpers: Helpers, episodes: Sequence[Episode]) -> list[Judgement]:
        questions = [self._question(helpers, e, role) for e in episodes for role in self.roles]
        replies = helpers.ask(questions)
        count = len(self.roles)
        return [
            self._judgement(episode, questions[k * count], replies[k * count : (k + 1) * count])
            for k, episode in enumerate(episodes)
        ]

    def _question(self, helpers: Helpers, episode: Episode, role: str) -> Question:
        gold = answer_spellings(episode.task)[:1] if self.show_answer else []
        case = [*case_blocks(episode), *(block("EXPECTED", answer) for answer in gold)]
        fields = {"role": role, "criterion": self.criteria.get(role, role)}
        return Question(
            self.helper,
            helpers.prompt("judge_system", **fields),
            helpers.prompt("judge", case="\n".join(case), **fields),
            f"evaluator{role and f'-{role}'}/{episode.task.id}",
            episode.id,
            bool(gold),
            self.share,
        )

    def _judgement(
        self, episode: Episode, question: Question, replies: Sequence[str | None]
    ) -> Judgement:
        said = [(r, text) for r, text in zip(self.roles, replies, strict=True) if text is not None]
        text = "\n\n".join(f"{role}: {words}" if role else words for role, words in said)
        blocks = [
            block("SYSTEM", question.system),
            block("INPUT", question.text),
            block("OUTPUT", text),
        ]
        score = score_of(episode, self.metric)
        return Judgement(score, text, "\n".join(blocks), question.saw_gold, tuple(said))


@dataclass(frozen=True)
class Shuffled:
    """Control: says of each episode of a batch what another evaluator has to say of the next one;
    scores stay where they are. The calls are the same."""

    evaluator: Evaluator

    def judge(self, helpers: Helpers, episodes: Sequence[Episode]) -> list[Judgement]:
        judged = self.evaluator.judge(helpers, episodes)
        return [
            replace(own, text=other.text, conversation=_with_result_of(own, other))
            for own, other in zip(judged, [*judged[1:], *judged[:1]], strict=True)
        ]


def _with_result_of(own: Judgement, other: Judgement) -> str:
    """The conversation of one judgement with the result of another."""
    for tag in ("<RESULT>", "<OUTPUT>"):
        head, found, _ = own.conversation.partition(tag)
        if found:
            return head + found + other.conversation.partition(tag)[2]
    return own.conversation


def score_of(episode: Episode, metric: str) -> float:
    """The team's reward of this name; 0 for an episode that failed, NaN for one that could not be
    scored."""
    score = episode.reward(metric)
    return 0.0 if math.isnan(score) and episode.failed else score


def case_blocks(episode: Episode) -> list[str]:
    """The task and the output of an episode, as blocks."""
    output = episode.output if episode.output is not None else f"(none: {episode.error})"
    return [block("TASK", episode.task.prompt), block("PREDICTION", output)]


def _reward_words(reward: Reward) -> str:
    value = "could not be scored" if math.isnan(reward.value) else f"{reward.value:g}"
    return f"{reward.name}: {value}" + (f" ({reward.text})" if reward.text else "")
