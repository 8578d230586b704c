"""The transcript of an episode: its turns, decisions and operations in order, and the replay of
recorded ones."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .seeds import derive_seed
from .types import AgentSpec, Completion, Decision, Message, Sampling, SettingError, Turn


class ReplayError(RuntimeError):
    """In a replay the system asked for something else than the recording holds."""


class LimitError(RuntimeError):
    """An episode asked for more turns than it may have."""


@dataclass(frozen=True)
class Call:
    """One request for completions. `previous` is the turn this chat goes on from, None for a new
    chat."""

    index: int
    agent: AgentSpec
    messages: tuple[Message, ...]
    sampling: Sampling
    n: int = 1
    previous: Turn | None = None


Ask = Callable[[Call], Awaitable[Sequence[Completion]]]


Choose = Callable[[Sequence[Turn]], "int | Awaitable[int]"]


@dataclass(frozen=True)
class Operation:
    """Plain Python between turns that a system wants on record, so that feedback can flow through
    it. Its index is of the turns' numbering: `reads` of turns and operations may name it."""

    index: int
    name: str
    reads: tuple[int, ...] = ()
    text: str = ""
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Output:
    """What a system returns, with the turns and operations that it was made of."""

    text: str
    reads: Sequence[Turn | Operation] = ()

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, returned: Any) -> Output | None:
        """What a system returned as an output; a turn is an output made of itself."""
        if returned is None or isinstance(returned, Output):
            return returned
        reads = (returned,) if isinstance(returned, (Turn, Operation)) else ()
        return cls(str(returned), reads)


class Transcript:
    """The turns, decisions and operations of one episode. Calls are numbered before anything is
    awaited, so the order of turns does not depend on how long answers take.

    Args:
        seed: the episode's; the seeds of requests and decisions follow from it.
        given: recorded turns that answer the first calls.
        replace: completions by turn index that answer instead of recorded or sampled ones.
        decisions: recorded decisions that are taken again.
        max_turns: bound on turn indices; a reply of an agent with tools takes 1 +
            `max_tool_calls` of them, used or not.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        max_turns: int = 200,
    ) -> None:
        self.seed, self.max_turns = seed, max_turns
        self.decisions: list[Decision] = []
        self.operations: list[Operation] = []
        self._turns: dict[int, list[Turn]] = {}
        self._next = 0
        self._given: dict[int, list[Turn]] = {}
        for turn in given:
            self._given.setdefault(turn.index, []).append(turn)
        self._replace = dict(replace or {})
        self._given_decisions = {d.index: d for d in decisions}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, siblings included, ordered by index."""
        return tuple(turn for index in sorted(self._turns) for turn in self._turns[index])

    def siblings(self, turn: Turn) -> tuple[Turn, ...]:
        """Every answer sampled by the call that gave `turn`, itself included."""
        return tuple(self._turns[turn.index])

    def reserve(self, count: int) -> int:
        """The first of `count` turn indices that belong to one call: a tool loop's turns do not
        depend on timing. Raises `LimitError` from `max_turns` on."""
        index, self._next = self._next, self._next + count
        if index >= self.max_turns:
            raise LimitError(f"episode asked for turn {index}; max_turns is {self.max_turns}")
        return index

    async def record(
        self,
        call: Call,
        complete: Ask,
        *,
        reads: tuple[int, ...] = (),
        choose: Choose | None = None,
        saw_gold: bool = False,
    ) -> Turn:
        """Get the completions of a call, recorded or from `complete`, and record them as turns.
        Returns the one that the chat goes on with: the first, or what `choose` picks."""
        self._turns[call.index] = []  # the call is on record even if it fails or is cancelled
        completions, sources = await self._completions(call, complete)
        turns = [
            Turn(
                index=call.index,
                agent=call.agent.name,
                messages=call.messages,
                reads=reads,
                sibling=k,
                taken=False,
                source=source,
                saw_gold=saw_gold,
                sampling=call.sampling,
                **{f.name: getattr(c, f.name) for f in fields(c)},
            )
            for k, (c, source) in enumerate(zip(completions, sources, strict=True))
        ]
        self._turns[call.index] = turns
        picked = choose(turns) if choose and len(turns) > 1 else 0
        number = await picked if inspect.isawaitable(picked) else picked
        if not 0 <= number < len(turns):
            raise SettingError(
                f"agent {call.agent.name!r}: choose returned {number}, expected a number below"
                f" {len(turns)}"
            )
        turns[number] = dataclasses.replace(turns[number], taken=True)
        return turns[number]

    def select(self, turn: Turn, *, taken: bool = True) -> None:
        """Mark afterwards which sibling the chat went on with (the others are then not taken), or,
        with `taken` False, that a turn was never read."""
        self._turns[turn.index] = [
            dataclasses.replace(
                each, taken=taken if each.sibling == turn.sibling else each.taken and not taken
            )
            for each in self._turns[turn.index]
        ]

    async def _completions(
        self, call: Call, complete: Ask
    ) -> tuple[Sequence[Completion], list[Any]]:
        """The completions of a call and the source of each: `sampled` or `written`."""
        if call.index in self._replace:
            # Sampled completions have their log-probabilities; a text, or tokens that another
            # policy wrote for this prompt, has none.
            replacement = self._replace[call.index]
            return [replacement], ["sampled" if replacement.logprobs else "written"]
        if call.index in self._given:
            recorded = self._given[call.index]
            # 1: only the taken one was given, or it had been replaced
            if len(recorded) not in (1, call.n):
                raise ReplayError(
                    f"turn {call.index}: the system now asks for {call.n} answers, the recording"
                    f" has {len(recorded)}"
                )
            if recorded[0].agent != call.agent.name or recorded[0].messages != call.messages:
                raise ReplayError(
                    f"turn {call.index}: the system now asks {call.agent.name!r} something else"
                    f" than the recording did ({recorded[0].agent!r}); give only the turns before"
                    " the first change"
                )
            return [turn.completion for turn in recorded], [turn.source for turn in recorded]
        completions = await complete(call)
        if len(completions) != call.n:
            raise RuntimeError(
                f"agent {call.agent.name!r}: asked for {call.n} completions, got {len(completions)}"
            )
        return completions, ["sampled"] * len(completions)

    def note(
        self, name: str, text: str, reads: Iterable[Turn | Operation] = (), error: str = ""
    ) -> Operation:
        """Record an operation; it takes the next index."""
        read = tuple(sorted({each.index for each in reads}))
        operation = Operation(self.reserve(1), name, read, text, error)
        self.operations.append(operation)
        return operation

    def decide(
        self,
        name: str,
        options: Sequence[str],
        logits: Mapping[str, float],
        *,
        about: str = "",
        greedy: bool = False,
    ) -> str:
        """Sample one of `options` by its logit (0 where it has none), or take the likeliest if
        `greedy` (the first of several), and record it; a recorded decision is taken again."""
        if not options:
            raise SettingError(f"team.decide({name!r}): expected at least one option")
        index = len(self.decisions)
        top = max((logits.get(o, 0.0) for o in options), default=0.0)
        weights = [math.exp(logits.get(o, 0.0) - top) for o in options]
        given = self._given_decisions.get(index)
        if given and (given.name != name or given.choice not in options):
            raise ReplayError(
                f"decision {index}: the system now decides {name!r} among {options}, the recording"
                f" has {given}"
            )
        rng = random.Random(derive_seed(self.seed, "decide", index))
        if given:
            choice = given.choice
        elif greedy:
            choice = options[weights.index(max(weights))]
        else:
            choice = rng.choices(list(options), weights)[0]
        logprob = math.log(weights[list(options).index(choice)] / sum(weights))
        self.decisions.append(Decision(index, name, tuple(options), choice, logprob, about))
        return choice
