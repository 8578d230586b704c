"""The ledger, which counts every call to a model where it is made, and the budget, which is asked
before a call with the most that the call could cost.

A call reserves that much before it is made and gives back what it did not use. What does not fit is
not made, so a budget of N tokens is never exceeded by one token as long as no server reports more
than was asked of it. A call that would fit if those in flight used less waits for them; one that
fits beside none of them ends the run (`BudgetSpent`).

Numbers stand in three places: calls of an episode that is still played, what stored episodes say of
themselves, and the rest (`unstored`: calls of no episode, of episodes that came to nothing, and
recalled ones). Only the rest is state: the store tells what its episodes cost. So after a kill and
a resume the ledger says what that of the uninterrupted run says.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, get_args

from ..agents.types import Usage, nearest, to_json
from .budget import Budget, Price, amounts, common_currency
from .engines.base import EngineError, PromptTooLong
from .types import Episode, Kind
from .usage import Booked, Key, book, book_rows, less, total, usage_by_policy

KINDS: tuple[str, ...] = get_args(Kind)
UNLIMITED = "eval"  # metered; the budget is for learning

NOTHING_SPENT: Mapping[str, Any] = {  # the state of a ledger at the start, and of runs of 0.1
    "unstored": [],
    "stored": 0,
    "replayed": [],
    "stopped": "",
    "limit": {},
}


class BudgetSpent(RuntimeError):
    """The next call may cost more than the budget has left; it was not made. The message names the
    limit, what is spent, and what the call would have needed."""


class MeteredCall:
    """One call while it is made.

    `most`: what is reserved for it; `usage`: what it has cost, once it has ended; `recorded`: its
    episode was stored before, so it is in the record already.
    """

    charged = False  # may its server have charged all that was reserved, whatever became of it?

    def __init__(self, ledger: Ledger, key: Key, episode: str, most: Usage, recorded: bool) -> None:
        self.key, self.episode, self.most, self.recorded = key, episode, most, recorded
        self.usage: Usage | None = None
        self._ledger, self._began = ledger, time.perf_counter()

    def begin(self) -> None:
        """It is made now: `seconds` count from here."""
        self._began = time.perf_counter()

    def done(self, usage: Usage) -> None:
        """Book what the call has cost, as its server reports it, and give back the rest. What the
        report leaves at 0 is filled in: one call, the wall-clock, the price. Raises `EngineError`
        for a report that cannot be true, `RuntimeError` the second time."""
        if self.usage is not None:
            raise RuntimeError(f"the call of agent {self.key[1]!r} is booked already")
        _check_report(self.key[2], usage)
        price = self._ledger.prices.get(self.key[2])
        self.usage = dataclasses.replace(
            usage,
            calls=usage.calls or 1,
            seconds=usage.seconds or time.perf_counter() - self._began,
            cost=usage.cost or (price.cost(usage) if price else 0.0),
        )
        self._ledger._end(self)

    def end(self) -> None:
        """Book a call that was left without a report: it failed or was cancelled.

        What it has cost is unknown. The server of an outside model, or one with a price, may have
        charged all that it was asked for, so all that was reserved is booked: nothing is
        undercounted. An engine of ours stops with the request: one call and no tokens are booked.
        """
        if self.usage is None:
            self.done(self.most if self.charged else Usage(calls=1))


def _check_report(policy: str, usage: Usage) -> None:
    for name, amount in dataclasses.asdict(usage).items():
        if not (math.isfinite(amount) and amount >= 0):
            raise EngineError(f"policy {policy!r}: its server reports {name} {amount!r} of a call")


class Ledger:
    """What a run's calls have cost, by kind of episode, agent and policy.

    Calls are made in one event loop; the numbers may be read, and episodes booked, in any thread.

    Args:
        budget: what the calls of every kind but `eval` may cost together.
        prices: by policy, of those that cost money. They have one `currency` ("": none has a
            price).
    """

    def __init__(
        self, budget: Budget | None = None, prices: Mapping[str, Price] | None = None
    ) -> None:
        self.budget, self.prices = budget or Budget(), dict(prices or {})
        self.budget.check(self.prices)
        self.currency = common_currency(self.prices)
        self.stopped = ""  # why no further call is made
        self._lock = threading.RLock()
        self._open: dict[str, Booked] = {}  # by episode
        self._stored: Booked = {}
        self._unstored: Booked = {}
        self._ids: set[str] = set()  # of stored episodes
        # what those of them have cost that this run has not come to again
        self._replayed: dict[str, Usage] = {}
        self._known = 0  # stored episodes at the time of the state that was loaded
        self._in_flight: set[MeteredCall] = set()
        # Sums that are asked for before every call: the most of those in flight, and what those
        # of `_open` have cost that the budget counts.
        self._reserved = self._open_spent = Usage()
        self._waiting: deque[tuple[MeteredCall, asyncio.Future[None]]] = deque()

    def limited(self, kind: str) -> bool:
        """Must the most that a call of this kind may cost be known before it is made?"""
        return bool(self.prices) or (kind != UNLIMITED and bool(self._limits()))

    # calls

    @contextlib.asynccontextmanager
    async def call(
        self,
        kind: str,
        agent: str,
        policy: str,
        *,
        prompt_tokens: int,
        sampled_tokens: int,
        episode: str = "",
        outside: bool = False,
    ) -> AsyncIterator[MeteredCall]:
        """Meter one call: make it inside, then say what it has cost with `done`.

        Args:
            prompt_tokens, sampled_tokens: the most it can cost, all its samples together.
            episode: id of the episode it is made for, "" for none. The calls of one that is stored
                already are counted there: played once more (a resumed run may have to, for the
                sake of those decoded beside it), they are neither limited nor booked.
            outside: the server is not ours, so it may go on with a request that was given up.

        Waits while calls in flight may leave room, in the order in which calls were asked for; so
        never ask for one inside another. Raises `BudgetSpent` if there is no room, and from then on
        for every call but those of kind `eval`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: no such kind of episode; {nearest(kind, KINDS)}")
        price = self.prices.get(policy)
        cost = price.most(prompt_tokens, sampled_tokens) if price else 0.0
        most = Usage(calls=1, prompt_tokens=prompt_tokens, sampled_tokens=sampled_tokens, cost=cost)
        with self._lock:
            recorded = episode in self._ids
        call = MeteredCall(self, (kind, agent, policy), episode, most, recorded)
        call.charged = outside or price is not None
        if kind != UNLIMITED and not recorded:
            await self._reserve(call)
        call.begin()
        try:
            yield call
        except PromptTooLong:  # refused: nothing was sampled
            if call.usage is None:
                call.done(Usage(calls=1))
            raise
        finally:
            call.end()

    async def _reserve(self, call: MeteredCall) -> None:
        """Wait until the call fits. Raises `BudgetSpent`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append((call, turn))
            self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                if turn.done() and not turn.cancelled():
                    turn.exception()  # looked at, so that asyncio does not warn
                self._waiting = deque(w for w in self._waiting if w[0] is not call)
                self._land(call)
                self._admit()
            raise

    def _admit(self) -> None:
        """Let waiting calls begin, in order, as far as they fit. If the first one does not fit and
        none is in flight that could leave room, none ever will: all are refused."""
        while self._waiting:
            call, turn = self._waiting[0]
            if not turn.done() and not self.stopped:
                limit = self._limit_exceeded(call)
                if limit and self._in_flight:
                    return
                self.stopped = self._refusal(limit, call) if limit else ""
            self._waiting.popleft()
            if turn.done():  # cancelled
                continue
            if self.stopped:
                turn.set_exception(BudgetSpent(self.stopped))
            else:
                self._in_flight.add(call)
                self._reserved += call.most
                turn.set_result(None)

    def _land(self, call: MeteredCall) -> None:
        if call in self._in_flight:
            self._in_flight.remove(call)
            self._reserved = less(self._reserved, call.most) if self._in_flight else Usage()

    def _limit_exceeded(self, call: MeteredCall) -> str:
        if not self._limits():
            return ""
        closed = [*self._stored.items(), *self._unstored.items()]
        spent = [usage for key, usage in closed if key[0] != UNLIMITED]
        return self.budget.exceeded(total([call.most, self._reserved, self._open_spent, *spent]))

    def _refusal(self, limit: str, call: MeteredCall) -> str:
        (kind, agent, _), most = call.key, call.most
        detail = f"{most.prompt_tokens} for its prompt, {most.sampled_tokens} sampled"
        needs, advice = {
            "tokens": (f"may need {amounts(most)['tokens']} ({detail})", " or lower max_tokens"),
            "calls": ("needs 1", ""),
            "cost": (f"may cost {most.cost:.6g} (tokens: {detail})", " or lower max_tokens"),
        }[limit]
        unit = f" {self.currency}" if limit == "cost" else ""
        return (
            f"budget.{limit} is {getattr(self.budget, limit):.12g}{unit}:"
            f" {amounts(self.spent())[limit]:.12g} spent, and the next call ({kind}, agent"
            f" {agent!r}) {needs}; raise budget.{limit}{advice}"
        )

    def _end(self, call: MeteredCall) -> None:
        assert call.usage is not None
        with self._lock:
            late = not call.episode or call.episode in self._ids
            booked = self._unstored if late else self._open.setdefault(call.episode, {})
            if not call.recorded:
                book(booked, call.key, call.usage)
                if not late and call.key[0] != UNLIMITED:
                    self._open_spent += call.usage
            self._land(call)
            self._admit()

    # episodes

    def stored(self, episode: Episode) -> None:
        """An episode is in the store: from now on its `usage` is the record of its calls. To be
        called in the order of the store; a second time changes nothing."""
        with self._lock:
            self._replayed.pop(episode.id, None)
            self._keep(episode)

    def dropped(self, episode_id: str) -> None:
        """An episode comes to nothing (cancelled, not needed, refused by the budget): what it has
        cost so far stays, outside the store."""
        with self._lock:
            for key, usage in self._close(episode_id).items():
                book(self._unstored, key, usage)

    def _close(self, episode_id: str) -> Booked:
        booked = self._open.pop(episode_id, {})
        parts = [usage for key, usage in booked.items() if key[0] != UNLIMITED]
        self._open_spent = less(self._open_spent, total([Usage(), *parts]))
        if not self._open:  # and no rest of rounding
            self._open_spent = Usage()
        return booked

    def spent_elsewhere(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Book calls that another process made for an episode that came to nothing: the `unstored`
        rows of its ledger."""
        with self._lock:
            book_rows(self._unstored, rows)

    def cached(self, episode: Episode) -> None:
        """An episode was recalled instead of played: its tokens are booked as cached ones, and
        nothing else. If a resumed run comes to one that it had played before it was cut off, this
        is that playing and is booked already."""
        with self._lock:
            if self._replayed.pop(episode.id, None) is not None:
                return
            for key, usage in usage_by_policy(episode).items():
                tokens = usage.prompt_tokens + usage.sampled_tokens
                book(self._unstored, key, Usage(cached_tokens=tokens))

    def replay(self, episodes: Iterable[Episode]) -> None:
        """Book the episodes that earlier processes of the run have stored: all of them, in the
        store's order, after `load_state_dict`."""
        with self._lock:
            for position, episode in enumerate(episodes):
                new = position >= self._known or episode.id in self._replayed
                if self._keep(episode) and new:
                    limited = {} if episode.kind == UNLIMITED else usage_by_policy(episode)
                    self._replayed[episode.id] = sum(limited.values(), Usage())

    def _keep(self, episode: Episode) -> bool:
        """Book a stored episode; False if it is booked already."""
        if episode.id in self._ids:
            return False
        self._ids.add(episode.id)
        self._close(episode.id)
        for key, usage in usage_by_policy(episode).items():
            book(self._stored, key, usage)
        return True

    # what was spent

    def rows(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{KIND: {AGENT: {calls, prompt_tokens, sampled_tokens, cached_tokens, seconds, cost}}}, of
        agents that were called or recalled."""
        return self._table(1)

    def by_policy(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As `rows`, by policy instead of agent. An agent's calls in a stored episode are those of
        the policy that its turns name ("" if it has no turn)."""
        return self._table(2)

    def _table(self, part: int) -> dict[str, dict[str, dict[str, Any]]]:
        sums: dict[tuple[str, str], Usage] = {}
        for key, usage in self._entries():
            row = key[0], key[part]
            sums[row] = sums.get(row, Usage()) + usage
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for kind, name in sorted(sums, key=lambda row: (KINDS.index(row[0]), row[1])):
            table.setdefault(kind, {})[name] = to_json(sums[kind, name])
        return table

    def spent(self) -> Usage:
        """What the budget counts: all kinds but `eval`, calls that have ended."""
        return total(usage for key, usage in self._entries() if key[0] != UNLIMITED)

    def _entries(self) -> list[tuple[Key, Usage]]:
        with self._lock:
            places = [self._stored, self._unstored, *self._open.values()]
            return [entry for booked in places for entry in booked.items()]

    def spent_so_far(self) -> dict[str, float]:
        """What the budget counts, without the stored episodes that a resumed run has not come to
        again: what the uninterrupted run had spent by now."""
        with self._lock:
            later = amounts(sum(self._replayed.values(), Usage()))
            return {name: spent - later[name] for name, spent in amounts(self.spent()).items()}

    def to_json(self) -> dict[str, Any]:
        """{limit: of those that are set, spent: {tokens, calls, cost}, stopped: why no further call
        was made, or ""}."""
        with self._lock:
            spent, stopped = amounts(self.spent()), self.stopped
        return {"limit": self._limits(), "spent": spent, "stopped": stopped}

    def _limits(self) -> dict[str, float]:
        return {name: limit for name, limit in to_json(self.budget).items() if limit is not None}

    # state

    def state_dict(self) -> dict[str, Any]:
        """What the store does not tell, as JSON: the unstored usage, how many of the store's
        episodes this run has stored, and which of them it has not come to again since it was
        resumed."""
        with self._lock:
            return {
                "unstored": [
                    {"kind": kind, "agent": agent, "policy": policy, **to_json(usage)}
                    for (kind, agent, policy), usage in self._unstored.items()
                ],
                "stored": len(self._ids),
                "replayed": sorted(self._replayed),
                "stopped": self.stopped,
                "limit": self._limits(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back; `replay` then adds what the store tells. A run that its budget has
        stopped stays so unless the budget was changed."""
        with self._lock:
            self._unstored = {}
            book_rows(self._unstored, state["unstored"])
            self._known, self._replayed = state["stored"], dict.fromkeys(state["replayed"], Usage())
            self.stopped = state["stopped"] if state["limit"] == self._limits() else ""
