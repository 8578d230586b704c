"""Collaboration: a debate in rounds whose members may use another policy in each round and see the
verdicts of a verifier.

The debate of MAPoRL (Park et al., arXiv:2502.18439): every member answers alone, then, round by
round, reads what the others answered last and answers again in the same chat. Against the paper: a
chat grows by appending, so what others wrote in earlier rounds stays in it; wordings are ours.

**Seats.** A member is one participant; with `separation` it has a seat (agent) for every part of
the debate, and the next seat continues its chat. Members `ann` and `bob` give

- `single`: agents `ann`, `bob`;
- `collaboration`: `ann-alone`, `bob-alone` for the first round and `ann-together`, `bob-together`
  for all later ones (freeze the first two policies, and only collaboration is learnt);
- `turn`: `ann-1`, `bob-1`, `ann-2`, ... one for every round.

A seat's policy is named in the same way after the member's policy: members with one `policy` share
weights, others do not, and two members may stand on different bases.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..chat import Agent
from ..concurrency import gather
from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.answers import extract, majority, normalise
from ..text.templates import render
from ..tools.verifiers import WORDS, Verifier, check_verifier, in_words, resolve_verifier, verify
from ..types import BASE, AgentSpec, SettingError, Task, Turn

SEPARATIONS = ("single", "collaboration", "turn")
REVISE = (
    "The others' solutions:\n\n{others}\n\nYour own{verdict} stands above. Weigh all of them, keep"
    " what holds, mend what does not, and do not just copy. Be brief and end with your answer. The"
    " question again:\n{prompt}"
)
REVISE_ALONE = (
    "Look at your solution{verdict} again, mend what does not hold, and end with your answer. The"
    " question again:\n{prompt}"
)
_FIELDS = {
    "ask": ("prompt",),
    "quote": ("member", "text", "answer", "verdict"),
    "revise": ("prompt", "others", "verdict"),
    "verdict": ("score", "words"),
}


@trusted("system")
@dataclass
class Collaboration(System):
    """One or more members; the output is the majority of the last answers (ties: see
    `answers.majority`).

    Args:
        rounds: answers of each member, the first one alone.
        separation: see above.
        verifier: scores every answer (see `verifiers.resolve_verifier`); "" is none. Its words are
            shown in later rounds.
        words: the words for a score below 0.3, below 0.6, below 0.8, and from there on.
        ask: a member's first prompt. Field: `prompt`.
        quote: how another's answer is shown. Fields: `member`, `text`, `answer` (the one found in
            it, see `answers.extract`; all of it if none is), `verdict`. It must show `text` or
            `answer`.
        revise: a member's prompt from the second round on. Fields: `others` (quotes), `verdict`
            (on its own answer), `prompt`. None is a wording of ours.
        verdict: a score in words. Fields: `words`, `score`. Empty without a verifier.
        stop_share, stop_score: after a round in which more than this share of the members gave one
            answer, whose mean score is above `stop_score` (if there is a verifier), the debate
            ends. Above 1 it never does.
    """

    rounds: int = setting("answers of each member, the first one alone", 2, at_least=1)
    separation: str = setting(
        "which rounds have an agent of their own", "single", choices=SEPARATIONS
    )
    verifier: str = ""
    words: Sequence[str] = WORDS
    ask: str = "{prompt}"
    quote: str = "[{member}]{verdict}\n{text}"
    revise: str | None = None
    verdict: str = " (a verifier says: {words}, {score})"
    stop_share: float = 1.1
    stop_score: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verifier:
            check_verifier(self.verifier)
        if len(self.words) != 4 or not all(isinstance(word, str) for word in self.words):
            raise SettingError(
                "words: expected four texts, from a low score's to a high one's, got"
                f" {self.words!r}"
            )
        for name, fields in _FIELDS.items():
            render(getattr(self, name) or "", dict.fromkeys(fields, ""), setting=name)
        if "{text}" not in self.quote and "{answer}" not in self.quote:
            raise SettingError(
                f"quote: expected {{text}} or {{answer}} in {self.quote!r}; else members would not"
                " read one another"
            )
        if tools := [spec.name for spec in self.specs if spec.tools]:
            raise SettingError(
                f"agents.{tools[0]}.tools: members of a Collaboration have none; every turn is an"
                " answer of a round"
            )
        if not self._seated():
            self.agents = tuple(
                seat
                for suffix in self._suffixes
                for spec in self.specs
                for seat in [_seat(spec, suffix)]
            )

    # Seats and members.

    @property
    def _suffixes(self) -> list[str]:
        if self.separation == "collaboration":
            return ["-alone", "-together"][: self.rounds]
        return (
            [f"-{number + 1}" for number in range(self.rounds)]
            if self.separation == "turn"
            else [""]
        )

    def _seated(self) -> bool:
        """Whether the agents are seats already, as in a checkpoint, rather than members."""
        return {spec.name for spec in self.specs} == {
            member + suffix for member in self.members for suffix in self._suffixes
        }

    @property
    def members(self) -> list[str]:
        """Names of the members, without the suffix of a round."""
        first = self._suffixes[0]
        return [spec.name.removesuffix(first) for spec in self.specs if spec.name.endswith(first)]

    @property
    def member_of(self) -> dict[str, str]:
        """Seat (agent) -> member."""
        return {member + suffix: member for member in self.members for suffix in self._suffixes}

    def seat(self, member: str, number: int) -> str:
        """The agent of a member in round `number` (0, 1, ...)."""
        return member + self._suffixes[min(number, len(self._suffixes) - 1)]

    # The debate.

    @functools.cached_property
    def _verifier(self) -> Verifier | None:
        return resolve_verifier(self.verifier) if self.verifier else None

    async def run(self, task: Task, team: Team) -> str:
        chats: dict[str, Agent] = {}
        drafts: dict[str, Turn] = {}
        scores: dict[str, float] = {}
        for number in range(self.rounds):
            for member in self.members:
                chats[member] = self._sit(team, member, number, chats.get(member))
            prompts = {
                member: self._prompt(task, member, drafts, scores) for member in self.members
            }
            others = {
                member: [turn for name, turn in drafts.items() if name != member]
                for member in self.members
            }
            turns = await gather(
                chats[member].reply(prompts[member], reads=others[member])
                for member in self.members
            )
            drafts = dict(zip(self.members, turns, strict=True))
            if number + 1 == self.rounds:
                break
            if self._verifier is not None:
                values = await gather(verify(self._verifier, task, turn.text) for turn in turns)
                scores = dict(zip(self.members, values, strict=True))
            if self._agreed(drafts, scores):
                break
        return majority(drafts.values(), team.rng)

    def _sit(self, team: Team, member: str, number: int, chat: Agent | None) -> Agent:
        seat = team[self.seat(member, number)]
        return seat if chat is None else chat if chat.name == seat.name else seat.take_over(chat)

    def _prompt(
        self, task: Task, member: str, drafts: Mapping[str, Turn], scores: Mapping[str, float]
    ) -> str:
        if not drafts:
            return render(self.ask, {"prompt": task.prompt}, setting="ask")
        quotes = [
            self._quote(turn, name, scores.get(name))
            for name, turn in drafts.items()
            if name != member
        ]
        template = self.revise or (REVISE if quotes else REVISE_ALONE)
        fields = {
            "prompt": task.prompt,
            "others": "\n\n".join(quotes),
            "verdict": self._in_words(scores.get(member)),
        }
        return render(template, fields, setting="revise")

    def _quote(self, turn: Turn, member: str, score: float | None) -> str:
        answer = extract(turn.text) or turn.text
        fields = {
            "member": member,
            "text": turn.text,
            "answer": answer,
            "verdict": self._in_words(score),
        }
        return render(self.quote, fields, setting="quote")

    def _in_words(self, score: float | None) -> str:
        if score is None:
            return ""
        fields = {"score": f"{score:.2f}", "words": in_words(score, self.words)}
        return render(self.verdict, fields, setting="verdict")

    def _agreed(self, drafts: Mapping[str, Turn], scores: Mapping[str, float]) -> bool:
        answers = {
            member: normalise(extract(turn.text) or turn.text) for member, turn in drafts.items()
        }
        most, count = Counter(answers.values()).most_common(1)[0]
        if count / len(answers) <= self.stop_share:
            return False
        agreed = [
            scores[member]
            for member, answer in answers.items()
            if answer == most and member in scores
        ]
        return not agreed or sum(agreed) / len(agreed) > self.stop_score


def _seat(spec: AgentSpec, suffix: str) -> AgentSpec:
    return replace(
        spec, name=spec.name + suffix, policy=BASE if spec.policy == BASE else spec.policy + suffix
    )
