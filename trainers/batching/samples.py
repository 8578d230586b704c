"""From episodes to token sequences: the only place that decides which tokens are trained on. Pure
Python.

An agent's successive turns whose prompt extends the sequence so far form one segment, so a chat is
one token sequence. A turn that does not extend it (a template that drops past thinking, a new chat,
a sibling that was not selected) is a segment of its own. The mask is 1 exactly on tokens the
agent's policy sampled in turns that are trained; prompts, tools, other agents are 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...agents.types import Turn
from ...rollouts.types import Episode, TurnKey


@dataclass(frozen=True)
class TrainingSequence:
    """One token sequence of one policy; all tuples have one entry per token.

    ids: prompt and reply tokens as the engine saw and returned them.
    mask: 1 where trained; the others are 0 (`sequence`: -1, `temperatures`: 1) where it is 0.
    logprobs: behaviour log-probabilities.
    advantages: of the token's turn.
    temperatures: it was sampled at.
    sequence: index of its turn.
    calls: how often the policy was called in the episode, whoever spoke as it.
    siblings: (turn index, sibling) of those trained turns that are not their call's first answer.
    """

    policy: str
    episode: str
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    temperatures: tuple[float, ...]
    sequence: tuple[int, ...]
    siblings: tuple[tuple[int, int], ...] = ()
    calls: int = 1

    @property
    def num_trained(self) -> int:
        return sum(self.mask)

    @property
    def keys(self) -> list[TurnKey]:
        """The turn of every trained token."""
        number = dict(self.siblings)
        return [(self.episode, turn, number.get(turn, 0)) for turn in self.sequence if turn >= 0]


@dataclass(frozen=True)
class Denominators:
    """The denominators of a policy's loss: its trained tokens and turns in the whole step, over all
    batches and ranks.

    A step's gradient therefore does not depend on packing, accumulation, number of ranks or number
    of agents.
    """

    tokens: float
    sequences: float

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(self.tokens + other.tokens, self.sequences + other.sequences)


def denominators(samples: Iterable[TrainingSequence]) -> dict[str, Denominators]:
    """Trained tokens and turns per policy; add over ranks before use."""
    totals: dict[str, Denominators] = {}
    for sample in samples:
        here = Denominators(sample.num_trained, len(set(sample.sequence) - {-1}))
        totals[sample.policy] = totals.get(sample.policy, Denominators(0, 0)) + here
    return totals


@dataclass
class _Segment:
    """A training sequence under construction.

    extendable: later turns may extend it (False for a sibling that was not selected).
    saw_answer: its prompt held the answer, so nothing that extends it is trained either.
    informed: the turns that saw the answer; one whose prompt goes on from theirs has seen it too,
        also where it is a segment of its own.
    """

    policy: str
    episode: str
    extendable: bool = True
    saw_answer: bool = False
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    siblings: list[tuple[int, int]] = field(default_factory=list)
    informed: list[Turn] = field(default_factory=list)

    def add_context(self, ids: Iterable[int]) -> None:
        for token in ids:
            self._add(token, 0, 0.0, 0.0, 1.0, -1)

    def add_trained(self, turn: Turn, advantage: float, temperature: float) -> None:
        logprobs = turn.logprobs or (0.0,) * len(turn.token_ids)
        if turn.sibling:
            self.siblings.append((turn.index, turn.sibling))
        for token, logprob in zip(turn.token_ids, logprobs, strict=True):
            self._add(token, 1, logprob, advantage, temperature, turn.index)

    def _add(
        self,
        token: int,
        mask: int,
        logprob: float,
        advantage: float,
        temperature: float,
        sequence: int,
    ) -> None:
        self.ids.append(token)
        self.mask.append(mask)
        self.logprobs.append(logprob)
        self.advantages.append(advantage)
        self.temperatures.append(temperature)
        self.sequence.append(sequence)

    def sample(self, calls: int) -> TrainingSequence:
        """The finished sample, without the tokens after the last trained one."""
        end = max(i for i, m in enumerate(self.mask) if m) + 1
        columns = ("ids", "mask", "logprobs", "advantages", "temperatures", "sequence")
        cut: dict[str, Any] = {name: tuple(getattr(self, name)[:end]) for name in columns}
        siblings = tuple(self.siblings)
        return TrainingSequence(self.policy, self.episode, siblings=siblings, calls=calls, **cut)


def samples(
    episodes: Iterable[Episode],
    advantages: Mapping[TurnKey, float],
    policy_of: Mapping[str, str],
    *,
    ratios: bool = True,
    keep_zeros: bool = False,
    learning: Collection[str] = (),
) -> tuple[list[TrainingSequence], Counter[tuple[str, str]]]:
    """Token sequences of all turns that are trained, and counts by (agent, reason) of those that
    were asked for but dropped.

    Args:
        advantages: per turn; for SFT its weight. A turn that is missing or 0 is read as context but
            not trained.
        keep_zeros: train turns of advantage 0 too, for losses with a term that has no advantage.
        policy_of: agent -> policy that learns; agents that are missing (frozen, outside models)
            give no sample. For ratios the policy that sampled a turn is the one it trains, as far
            as it is among these or those that are `learning`, though no agent speaks as them now.
        ratios: True for policy gradients, which need the probability every token was drawn with:
            written turns, turns sampled off the softmax (top_p, T = 0, ...) or without log-probs
            are dropped. False for SFT and preferences, which score at T = 1.

    Turns that saw the answer, or extend one that did, are never trained. Raises ValueError at an
    advantage that is not finite.
    """
    sequences: list[TrainingSequence] = []
    dropped: Counter[tuple[str, str]] = Counter()
    spoken = {*policy_of.values(), *learning} if ratios else set()
    for episode in episodes:
        open_by_agent: dict[str, list[_Segment]] = {}
        turns = _with_policies(episode, policy_of, spoken)
        for turn, policy in turns:
            key = (episode.id, turn.index, turn.sibling)
            advantage = advantages.get(key, 0.0)
            if not math.isfinite(advantage):
                raise ValueError(
                    f"episode {episode.id}, turn {turn.index} of {turn.agent!r}: advantage"
                    f" {advantage}; credit must be finite"
                )
            segments = open_by_agent.setdefault(turn.agent, [])
            segment = _place(segments, turn, policy, episode.id)
            asked = bool(advantage) or (keep_zeros and key in advantages)
            reason = _unfit(episode, turn, segment, ratios) if asked else "zero advantage"
            if not reason:
                segment.add_trained(turn, advantage, turn.sampling.temperature if ratios else 1.0)
                continue
            if key in advantages:
                dropped[turn.agent, reason] += 1
            segment.add_context(turn.token_ids)
        calls, found = _calls(turns), [s for each in open_by_agent.values() for s in each]
        sequences += [s.sample(calls.get(s.policy, 1)) for s in found if any(s.mask)]
    return sequences, dropped


def _with_policies(
    episode: Episode, policy_of: Mapping[str, str], spoken: Collection[str]
) -> list[tuple[Turn, str]]:
    """The turns that a policy may learn from, each with that policy."""
    named = (
        (turn, turn.policy if turn.policy in spoken else policy_of.get(turn.agent))
        for turn in episode.turns
    )
    return [(turn, policy) for turn, policy in named if policy is not None]


def _calls(turns: Iterable[tuple[Turn, str]]) -> Counter[str]:
    """How often each policy was called: siblings are answers to one call, and what was written was
    none."""
    return Counter(
        policy
        for _, policy in {
            (turn.index, policy) for turn, policy in turns if turn.source == "sampled"
        }
    )


def _place(segments: list[_Segment], turn: Turn, policy: str, episode: str) -> _Segment:
    """The segment that this turn's reply goes into, with its prompt as context: the longest of its
    policy that it extends, else a new one (a fork).

    A sibling that was not selected always gets a segment of its own, in which everything before is
    context.
    """
    prompt = list(turn.prompt_ids)
    extended = [
        s
        for s in segments
        if s.policy == policy and s.extendable and s.ids and prompt[: len(s.ids)] == s.ids
    ]
    segment = max(extended, key=lambda s: len(s.ids), default=None)
    saw_answer = (
        turn.saw_gold
        or (segment is not None and segment.saw_answer)
        or any(_goes_on(turn, earlier) for s in segments for earlier in s.informed)
    )
    if segment is None or not turn.taken:
        segment = _Segment(policy, episode, extendable=turn.taken)
        segments.append(segment)
    segment.saw_answer = saw_answer
    segment.informed += [turn] * saw_answer
    segment.add_context(prompt[len(segment.ids) :])
    return segment


def _goes_on(turn: Turn, earlier: Turn) -> bool:
    """Does a turn's prompt hold the whole prompt of an earlier one of its agent, by tokens or (a
    template that writes past replies otherwise) by messages?"""
    return any(
        len(past) > 0 and now[: len(past)] == past
        for now, past in ((turn.prompt_ids, earlier.prompt_ids), (turn.messages, earlier.messages))
    )


def _unfit(episode: Episode, turn: Turn, segment: _Segment, ratios: bool) -> str:
    """The reason that a turn cannot be trained; "" if it can."""
    if episode.error:
        return "failed episode"
    if segment.saw_answer:
        return "saw the answer"
    if not turn.token_ids:
        return "no tokens"
    if not turn.prompt_ids:
        return "no prompt"
    if len(turn.token_ids) != len(turn.logprobs) and (ratios or turn.logprobs):
        return "as many log-probs as tokens expected"
    if ratios and turn.policy not in ("", segment.policy):
        return f"spoken by policy {turn.policy!r}"
    if ratios and turn.source == "written":
        return "written, not sampled"
    if ratios and not turn.sampling.on_policy:
        return "sampled off the softmax"
    if ratios and not all(math.isfinite(x) for x in turn.logprobs):
        return "log-prob not finite"
    return ""
