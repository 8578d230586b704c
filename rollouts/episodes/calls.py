"""The calls of one episode: completed by the completer of their policy, metered, and asked again
where the answer of an outside model was lost."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...agents.state import TeamState
from ...agents.transcript import Call
from ...agents.types import Completion, Usage
from ..ledger import Ledger, MeteredCall
from ..types import Kind
from .completers import AnswerLost, Completer

TRIES = 4  # calls, of which all but the last one's answers are lost


@dataclass
class EpisodeCalls:
    """Completes an agent's calls in one episode, and adds what they cost to `usage`.

    Args:
        completers: by policy. state: gives that of the next call.
        usage: by agent. A call that fails stands in it as the ledger books it.
        ledger: meters every call as one of `kind`, and refuses one that the budget has no room for.
        episode: the id under which they are booked, "" for an episode that is not recorded.
    """

    completers: Mapping[str, Completer]
    state: Callable[[], TeamState]
    usage: dict[str, Usage]
    ledger: Ledger | None
    kind: Kind
    episode: str

    async def __call__(self, call: Call) -> list[Completion]:
        """The completions of a call. Raises as its completer does, and `BudgetSpent`."""
        for _ in range(TRIES - 1):
            try:
                return await self._once(call)
            except AnswerLost as lost:
                await asyncio.sleep(lost.pause)
        return await self._once(call)

    async def _once(self, call: Call) -> list[Completion]:
        if self.ledger is None:
            completions, used = await self._sample(call)
            self.usage[call.agent.name] += used
            return completions
        completer = self.completers[call.agent.policy]
        bounded = completer.outside or self.ledger.limited(self.kind)
        metered: MeteredCall | None = None
        try:
            async with self.ledger.call(
                self.kind,
                call.agent.name,
                call.agent.policy,
                prompt_tokens=completer.most_prompt_tokens(call) if bounded else 0,
                sampled_tokens=call.n * call.sampling.max_tokens,
                episode=self.episode,
                outside=completer.outside,
            ) as metered:
                completions, used = await self._sample(call)
                metered.done(used)
            return completions
        finally:
            if metered is not None and metered.usage is not None:
                self.usage[call.agent.name] += metered.usage

    async def _sample(self, call: Call) -> tuple[list[Completion], Usage]:
        began, policy = time.perf_counter(), call.agent.policy
        version = self.state().versions.get(policy, "")
        completions = await self.completers[policy](call, version)
        used = cost_of(completions)
        return completions, dataclasses.replace(used, seconds=time.perf_counter() - began)


def cost_of(completions: Sequence[Completion]) -> Usage:
    """One call's tokens: what an outside model's server reports, else those of its ids. A prompt
    counts once, however many completions it has."""
    reported = next((c.usage for c in completions if c.usage is not None), None)
    if reported is not None:
        return dataclasses.replace(reported, calls=1)
    prompt = len(completions[0].prompt_ids) if completions else 0
    return Usage(1, prompt, sum(len(c.token_ids) for c in completions))
