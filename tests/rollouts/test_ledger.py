"""The ledger counts every call once, also across a kill and a resume, and a budget is never exceeded
by one token."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from itertools import product
from typing import Any

import pytest

from marlora.agents.types import Task, Turn, Usage
from marlora.rollouts.budget import Budget, Price
from marlora.rollouts.engines.base import EngineError, PromptTooLong
from marlora.rollouts.ledger import NOTHING_SPENT, BudgetSpent, Ledger
from marlora.rollouts.types import Episode, Kind

USD = Price("USD", prompt=3.0, sampled=15.0, cached=0.3)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in an event loop of its own, half a minute at most: nothing deadlocks."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


def used(prompt: int, sampled: int, **other: Any) -> Usage:
    return Usage(calls=1, prompt_tokens=prompt, sampled_tokens=sampled, seconds=0.5, **other)


async def ask(
    ledger: Ledger,
    prompt: int,
    sampled: int,
    actual: Usage | None = None,
    *,
    kind: str = "train",
    agent: str = "a",
    policy: str = "p",
    episode: str = "",
    during: Awaitable[Any] | None = None,
) -> Usage:
    """One call that reserves (prompt, sampled) and reports `actual` (None: all of it)."""
    async with ledger.call(
        kind, agent, policy, prompt_tokens=prompt, sampled_tokens=sampled, episode=episode
    ) as call:
        await (during or asyncio.sleep(0))
        call.done(actual or used(prompt, sampled))
    assert call.usage is not None
    return call.usage


def tokens(ledger: Ledger) -> int:
    return ledger.spent().prompt_tokens + ledger.spent().sampled_tokens


def episode(name: str, kind: Kind = "train", *turns: Turn, **usage: Usage) -> Episode:
    return Episode(name, "g", Task("t", "?"), kind=kind, turns=turns, usage=usage)


# the budget


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_no_token_too_many_with_200_calls_at_once(seed: int) -> None:
    """Servers count every token as it comes; some calls fail, some are cancelled."""
    rng, limit = random.Random(seed), 6_000
    ledger, served, peak = Ledger(Budget(tokens=limit), {"p": USD}), [0], [0]

    async def one(prompt: int, most: int, actual: int, fails: bool) -> int:
        """0, or the tokens of a call that was refused."""
        try:
            async with ledger.call(
                "train", "a", "p", prompt_tokens=prompt, sampled_tokens=most
            ) as call:
                served[0] += prompt
                for _ in range(actual):
                    await asyncio.sleep(0)
                    served[0] += 1
                    peak[0] = max(peak[0], served[0])
                if fails:
                    raise ConnectionError
                call.done(used(prompt, actual))
        except BudgetSpent:
            return prompt + most
        except ConnectionError:
            pass
        return 0

    sizes = [(rng.randint(1, 30), rng.randint(1, 60)) for _ in range(200)]
    tasks = [
        asyncio.create_task(one(prompt, most, rng.randint(0, most), rng.random() < 0.1))
        for prompt, most in sizes
    ]
    for task in rng.sample(tasks, 20):
        asyncio.get_running_loop().call_later(rng.random() / 20, task.cancel)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [size for size in ended if isinstance(size, int) and size]
    assert 0 < len(refused) < 150
    assert peak[0] <= served[0] <= tokens(ledger) <= limit
    # what was refused first did not fit, with nothing in flight
    assert tokens(ledger) + max(refused) > limit and ledger.stopped


@in_loop
async def test_a_call_waits_for_those_in_flight_and_then_fits() -> None:
    ledger, first_ends = Ledger(Budget(tokens=100)), asyncio.Event()
    first = asyncio.create_task(ask(ledger, 20, 40, used(20, 10), during=first_ends.wait()))
    second = asyncio.create_task(ask(ledger, 20, 50))  # 60 + 70 do not fit, 30 + 70 do
    third = asyncio.create_task(ask(ledger, 1, 1))  # would fit, and does not overtake
    await asyncio.sleep(0.01)
    assert not second.done() and not third.done()
    first_ends.set()
    assert await first == used(20, 10) and await second == used(20, 50)
    with pytest.raises(BudgetSpent):
        await third
    assert tokens(ledger) == 100


@pytest.mark.parametrize("admitted", [False, True])
@in_loop
async def test_a_waiting_call_that_is_cancelled_leaves_nothing_behind(admitted: bool) -> None:
    ledger, first_ends = Ledger(Budget(tokens=100)), asyncio.Event()
    first = asyncio.create_task(ask(ledger, 20, 60, used(20, 0), during=first_ends.wait()))
    waiting = asyncio.create_task(ask(ledger, 80, 0))
    behind = asyncio.create_task(ask(ledger, 30, 0 if not admitted else 50))
    await asyncio.sleep(0.01)
    if admitted:  # it may begin, and is cancelled before it does
        first_ends.set()
        while not first.done():
            await asyncio.sleep(0)
    waiting.cancel()
    first_ends.set()
    await asyncio.gather(first, behind)
    assert waiting.cancelled() and ledger.spent().calls == 2


@in_loop
async def test_room_is_not_given_to_a_call_that_was_just_cancelled() -> None:
    ledger = Ledger(Budget(tokens=100))
    async with ledger.call("train", "a", "p", prompt_tokens=60, sampled_tokens=0) as call:
        waiting = asyncio.create_task(ask(ledger, 90, 0))
        behind = asyncio.create_task(ask(ledger, 95, 0))
        await asyncio.sleep(0)
        waiting.cancel()
        call.done(used(5, 0))  # before the cancelled task runs again
    assert await behind == used(95, 0) and waiting.cancelled()


def three_limits() -> list[tuple[Budget, str]]:
    return [
        (
            Budget(tokens=1000),
            "budget.tokens is 1000: 940 spent, and the next call (trial, agent 'solver') may need"
            " 84 (20 for its prompt, 64 sampled); raise budget.tokens or lower max_tokens",
        ),
        (
            Budget(calls=1),
            "budget.calls is 1: 1 spent, and the next call (trial, agent 'solver') needs 1; raise"
            " budget.calls",
        ),
        (
            Budget(cost=0.007),
            "budget.cost is 0.007 USD: 0.0063 spent, and the next call (trial, agent 'solver') may"
            " cost 0.00102 (tokens: 20 for its prompt, 64 sampled); raise budget.cost or lower"
            " max_tokens",
        ),
    ]


@pytest.mark.parametrize(("budget", "message"), three_limits())
@in_loop
async def test_what_does_not_fit_is_refused_and_so_is_all_that_follows(
    budget: Budget, message: str
) -> None:
    ledger = Ledger(budget, {"p": USD})
    await ask(ledger, 650, 290)  # 650 x 3 + 290 x 15 = 6,300 per million
    for size in ((20, 64), (1, 1)):  # the second would fit into most
        with pytest.raises(BudgetSpent) as caught:
            await ask(ledger, *size, kind="trial", agent="solver")
        assert str(caught.value) == message == ledger.stopped
    limit = {name: value for name, value in vars(budget).items() if value is not None}
    spent = {"tokens": 940, "calls": 1, "cost": pytest.approx(0.0063)}
    assert ledger.to_json() == {"limit": limit, "spent": spent, "stopped": message}
    await ask(ledger, 20, 64, kind="eval")
    assert ledger.spent().calls == 1 and ledger.rows()["eval"]["a"]["calls"] == 1


@in_loop
async def test_all_that_wait_are_refused_with_the_first() -> None:
    ledger, ends = Ledger(Budget(tokens=100)), asyncio.Event()
    first = asyncio.create_task(ask(ledger, 20, 40, during=ends.wait()))
    waiting = [asyncio.create_task(ask(ledger, n, 0)) for n in (90, 5, 5)]
    await asyncio.sleep(0.01)
    ends.set()
    found = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [type(each) for each in found] == [Usage, BudgetSpent, BudgetSpent, BudgetSpent]
    assert ledger.spent().calls == 1


@in_loop
async def test_a_budget_too_small_for_the_first_call_says_so() -> None:
    with pytest.raises(BudgetSpent, match=r"^budget.tokens is 10: 0 spent, .* may need 11 \("):
        await ask(Ledger(Budget(tokens=10)), 1, 10)


@in_loop
async def test_a_budget_can_be_spent_to_the_last_token_call_and_cent() -> None:
    ledger = Ledger(Budget(tokens=30, calls=3, cost=0.3), {"p": Price("USD", 1e4, 1e4)})
    for _ in range(3):  # 0.1 + 0.1 + 0.1 is above 0.3 in floats
        await ask(ledger, 5, 5)
    assert (tokens(ledger), ledger.spent().calls) == (30, 3) and not ledger.stopped


# what a call books


@in_loop
async def test_a_server_that_reports_more_than_was_asked_of_it_is_believed() -> None:
    ledger = Ledger(Budget(tokens=40))
    await ask(ledger, 5, 5, used(5, 50))
    assert tokens(ledger) == 55
    with pytest.raises(BudgetSpent, match=r"^budget.tokens is 40: 55 spent"):
        await ask(ledger, 1, 1)


@in_loop
async def test_a_call_without_a_report_costs_what_may_have_been_charged() -> None:
    ledger = Ledger(Budget(tokens=1000), {"outside": USD})

    async def fail(policy: str, cancel: bool) -> Usage:
        with pytest.raises(asyncio.CancelledError if cancel else ConnectionError):
            async with ledger.call(
                "train", policy, policy, prompt_tokens=100, sampled_tokens=200
            ) as call:
                raise asyncio.CancelledError if cancel else ConnectionError
        assert call.usage is not None
        return call.usage

    for cancel in (False, True):
        own, outside = await fail("own", cancel), await fail("outside", cancel)
        assert (own.calls, own.prompt_tokens, own.sampled_tokens, own.cost) == (1, 0, 0, 0.0)
        assert (outside.calls, outside.prompt_tokens, outside.sampled_tokens) == (1, 100, 200)
        assert outside.cost == pytest.approx(0.0033)  # 100 x 3 + 200 x 15 per million
    assert tokens(ledger) == 600
    await ask(ledger, 100, 300)  # nothing is reserved any more


@in_loop
async def test_an_outside_server_may_go_on_and_a_prompt_that_is_refused_costs_nothing() -> None:
    ledger = Ledger(prices={"priced": USD})
    for policy, outside, error, sampled in (
        ("free", True, TimeoutError, 200),
        ("free", True, PromptTooLong, 0),
        ("priced", True, PromptTooLong, 0),
        ("own", False, TimeoutError, 0),
    ):
        with pytest.raises(error):
            async with ledger.call(
                "train", "a", policy, prompt_tokens=100, sampled_tokens=200, outside=outside
            ) as call:
                raise error
        assert call.usage is not None
        assert (call.usage.calls, call.usage.sampled_tokens) == (1, sampled)
    assert (tokens(ledger), ledger.spent().calls, ledger.spent().cost) == (300, 4, 0.0)


@in_loop
async def test_what_a_report_leaves_out_is_filled_in() -> None:
    ledger = Ledger(prices={"p": USD})
    usage = await ask(ledger, 9, 9, Usage(prompt_tokens=4, sampled_tokens=2))
    assert usage.calls == 1 and usage.seconds > 0 and usage.cost == pytest.approx(42e-6)
    assert (await ask(ledger, 9, 9, used(4, 2, cost=0.5))).cost == 0.5


@in_loop
async def test_a_report_that_cannot_be_true_ends_the_call() -> None:
    ledger = Ledger()
    for wrong in (Usage(sampled_tokens=-5), Usage(cost=float("nan"))):
        with pytest.raises(EngineError, match=r"^policy 'p': its server reports (sampled|cost)"):
            await ask(ledger, 1, 1, wrong)
    assert (tokens(ledger), ledger.spent().calls, ledger.spent().cost) == (0, 2, 0.0)
    async with ledger.call("train", "a", "p", prompt_tokens=1, sampled_tokens=1) as call:
        call.done(used(1, 1))
        with pytest.raises(RuntimeError, match="booked already"):
            call.done(used(1, 1))
    with pytest.raises(ValueError, match="kind 'tral': no such kind of episode; did you mean"):
        await ask(ledger, 1, 1, kind="tral")


@in_loop
async def test_rows_by_kind_agent_and_policy() -> None:
    ledger = Ledger(prices={"q": USD})
    await ask(ledger, 100, 9, used(100, 3))
    await ask(ledger, 100, 9, used(100, 4), policy="q")
    await ask(ledger, 100, 9, used(50, 5), agent="b", policy="q")
    await ask(ledger, 100, 9, used(70, 7), kind="eval")
    cost = {"a": 360e-6, "b": 225e-6}  # 100 x 3 + 4 x 15, 50 x 3 + 5 x 15 per million

    def row(calls: int, prompt: int, sampled: int, cost: float) -> dict[str, Any]:
        numbers = {"calls": calls, "prompt_tokens": prompt, "sampled_tokens": sampled}
        return numbers | {"cached_tokens": 0, "seconds": calls / 2, "cost": pytest.approx(cost)}

    assert ledger.rows() == {
        "train": {"a": row(2, 200, 7, cost["a"]), "b": row(1, 50, 5, cost["b"])},
        "eval": {"a": row(1, 70, 7, 0)},
    }
    assert ledger.by_policy() == {
        "train": {"p": row(1, 100, 3, 0), "q": row(2, 150, 9, cost["a"] + cost["b"])},
        "eval": {"p": row(1, 70, 7, 0)},
    }
    spent = ledger.spent()
    assert (spent.calls, spent.prompt_tokens, spent.sampled_tokens, spent.seconds) == (
        3,
        250,
        12,
        1.5,
    )
    assert spent.cost == pytest.approx(585e-6)


# episodes


@in_loop
async def test_an_episode_is_counted_once_open_stored_dropped_or_recalled() -> None:
    ledger = Ledger()
    call = await ask(ledger, 10, 5, episode="e")
    played = episode("e", "train", Turn(0, "a", policy="p"), a=call)
    before = ledger.rows(), ledger.by_policy()
    assert ledger.state_dict()["unstored"] == []
    for _ in range(2):
        ledger.stored(played)
        assert (ledger.rows(), ledger.by_policy()) == before
    await ask(ledger, 1, 0)
    await ask(ledger, 2, 0, episode="f")
    ledger.dropped("f")
    ledger.cached(played)
    (row,) = ledger.state_dict()["unstored"]
    assert (row["calls"], row["prompt_tokens"], row["cached_tokens"]) == (2, 3, 15)
    assert ledger.rows()["train"]["a"] == {
        **{"calls": 3, "prompt_tokens": 13, "sampled_tokens": 5, "cached_tokens": 15},
        **{"seconds": 1.5, "cost": 0.0},
    }


@in_loop
async def test_calls_of_a_stored_episode_are_counted_there() -> None:
    """Played once more, they cost nothing; one that ends after its episode was stored does."""
    ledger = Ledger(Budget(tokens=20))
    async with ledger.call(
        "train", "a", "p", prompt_tokens=5, sampled_tokens=0, episode="e"
    ) as late:
        ledger.stored(episode("e", a=used(10, 5)))
        late.done(used(5, 0))
    assert tokens(ledger) == 20 and len(ledger.state_dict()["unstored"]) == 1
    assert await ask(ledger, 10, 5, episode="e") == used(10, 5)
    ledger.stored(episode("e", a=used(10, 5)))
    assert tokens(ledger) == 20 and not ledger.stopped


class Killed(Exception):
    """The process of a run is gone."""


class Process:
    """A run of four steps, killed at its n-th event. In each step three episodes are played and one
    is dropped; one candidate is tried twice (the second time it is recalled), and one of an earlier
    step once more."""

    def __init__(self, store: list[Episode], saved: list[str], kill_at: int) -> None:
        self.store, self.saved, self.left = store, saved, kill_at
        self.ledger, self.first = Ledger(prices={"q": USD}), 1
        if saved:
            state = json.loads(saved[-1])
            self.first = state["step"] + 1
            self.ledger.load_state_dict(state["ledger"])
        self.ledger.replay(store)

    def event(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def known(self) -> Mapping[str, Episode]:
        return {e.id: e for e in self.store}

    async def play(self, name: str, kind: Kind, keep: bool = True) -> None:
        usage: dict[str, Usage] = {}
        for agent, policy in (("a", "p"), ("b", "q")):
            self.event()
            actual = used(10 + sum(map(ord, name)) % 7, 3)
            usage[agent] = await ask(
                self.ledger, 40, 9, actual, kind=kind, agent=agent, policy=policy, episode=name
            )
        self.event()
        if not keep:
            self.ledger.dropped(name)
        if not keep or name in self.known():
            return
        turns = [Turn(0, "a", policy="p"), Turn(1, "b", policy="q")]
        self.store.append(episode(name, kind, *turns, **usage))
        self.event()
        self.ledger.stored(self.store[-1])

    async def trial(self, name: str) -> None:
        if name in self.known():
            self.ledger.cached(self.known()[name])
        else:
            await self.play(name, "trial")

    async def run(self) -> Ledger:
        for step in range(self.first, 5):
            group = [f"train-{step}/{k}" for k in range(3)]
            if not self.known().keys() >= set(group):
                for name in group:  # also stored ones, which were decoded beside the others
                    await self.play(name, "train")
            await self.play(f"late-{step}", "train", keep=False)
            for candidate in (step, step, max(step - 2, 1)):
                await self.trial(f"candidate-{candidate}")
            self.event()
            if step % 2 == 0:  # `save_every: 2`
                state = {"step": step, "ledger": self.ledger.state_dict()}
                self.saved.append(json.dumps(state))
        return self.ledger


def told(ledger: Ledger) -> tuple[Any, ...]:
    state = {**ledger.state_dict(), "replayed": None}
    return ledger.rows(), ledger.by_policy(), ledger.spent(), state


@in_loop
async def test_a_run_killed_anywhere_and_resumed_tells_what_the_uninterrupted_one_does() -> None:
    whole = Process([], [], 10**9)
    expected = told(await whole.run())
    events = 10**9 - whole.left
    assert whole.ledger.rows()["trial"]["a"]["cached_tokens"] > 0 and events > 50
    kills = product(range(1, events + 1), ((3, False), (10, True)))
    for first_kill, (second_kill, lost) in kills:
        store: list[Episode] = []
        saved: list[str] = []
        ended = None
        for kill_at in (first_kill, second_kill, 10**9):
            try:
                ended = await Process(store, saved, kill_at).run()
                break
            except Killed:
                if lost and kill_at == first_kill:
                    saved.clear()  # the checkpoints; the store is whole
        assert ended is not None and told(ended) == expected, (first_kill, second_kill, lost)


def test_a_replayed_episode_that_was_stored_again_is_cached_from_then_on() -> None:
    ledger, played = Ledger(), episode("e", a=used(10, 5))
    ledger.replay([played])
    ledger.stored(played)
    ledger.cached(played)
    row = ledger.rows()["train"]["a"]
    assert (row["calls"], row["prompt_tokens"], row["cached_tokens"]) == (1, 10, 15)


@in_loop
async def test_a_stopped_run_stays_stopped_unless_its_budget_is_another() -> None:
    ledger = Ledger(Budget(tokens=10))
    with pytest.raises(BudgetSpent) as caught:
        await ask(ledger, 6, 5)
    state = json.loads(json.dumps(ledger.state_dict()))
    same, larger = Ledger(Budget(tokens=10)), Ledger(Budget(tokens=11))
    for each in (same, larger):
        each.load_state_dict(state)
    assert same.stopped == str(caught.value)
    with pytest.raises(BudgetSpent):
        await ask(same, 1, 1)
    await ask(larger, 6, 5)


class Asked(dict[str, Usage]):
    """The usage of an episode, which lets another thread read while it is looked at."""

    def __init__(self, usage: Mapping[str, Usage], read: Callable[[], None]) -> None:
        super().__init__(usage)
        self.read = read

    def items(self) -> Any:
        self.read()
        return super().items()


@in_loop
async def test_another_thread_never_reads_an_episode_half_moved() -> None:
    ledger, seen = Ledger(), list[tuple[int, int]]()

    def read() -> None:
        seen.append((ledger.spent().calls, ledger.rows()["train"]["a"]["calls"]))

    reader = threading.Thread(target=read)

    def while_moved() -> None:
        reader.start()
        reader.join(0.2)  # it has to wait for the lock

    usage = await ask(ledger, 1, 1, episode="e")
    whole = episode("e", a=usage)
    ledger.stored(dataclasses.replace(whole, usage=Asked(whole.usage, while_moved)))
    reader.join()
    assert seen == [(1, 1)]


def test_what_is_spent_so_far_leaves_out_what_a_resumed_run_has_not_come_to_again() -> None:
    earlier = [
        Episode(name, "g", Task("t", "?"), usage={"solver": Usage(calls=1, sampled_tokens=count)})
        for name, count in (("a", 10), ("b", 20), ("c", 40))
    ]
    ledger = Ledger()
    ledger.load_state_dict({**NOTHING_SPENT, "stored": 1})
    ledger.replay(earlier)
    assert ledger.spent().sampled_tokens == 70
    assert ledger.spent_so_far()["tokens"] == 10, "a was there at the checkpoint"
    ledger.cached(earlier[1])
    assert ledger.spent_so_far()["tokens"] == 30
    saved = ledger.state_dict()
    again = Ledger()
    again.load_state_dict(saved)
    again.replay(earlier)
    assert again.spent_so_far()["tokens"] == 30 and again.spent().sampled_tokens == 70
    again.stored(earlier[2])
    assert again.spent_so_far() == again.to_json()["spent"]


@in_loop
async def test_a_call_is_admitted_in_the_same_time_however_many_are_open() -> None:
    """What is asked before every call are running sums: they are those of all entries, and no
    entry of an open episode is looked at."""
    rng, ledger = random.Random(0), Ledger(Budget(tokens=10**9))
    for number in range(300):
        kind: Kind = rng.choice(["train", "eval", "trial"])
        await ask(ledger, rng.randrange(9), 5, kind=kind, episode=f"e{rng.randrange(40)}")
        if number % 7 == 0:
            ledger.dropped(f"e{rng.randrange(40)}")
        open_ = [u for b in ledger._open.values() for key, u in b.items() if key[0] != "eval"]
        counted = {name: sum(getattr(u, name) for u in open_) for name in TOKENS}
        assert {name: getattr(ledger._open_spent, name) for name in TOKENS} == counted
        assert ledger._reserved == Usage()
    for name in list(ledger._open):
        ledger.dropped(name)
    assert ledger._open_spent == Usage()
    seen: list[int] = []
    ledger._open = dict.fromkeys(map(str, range(1000)), Watched(seen))  # type: ignore[arg-type]
    await ask(ledger, 1, 1, episode="another")
    assert seen == []


TOKENS = ("calls", "prompt_tokens", "sampled_tokens")


class Watched(dict[Any, Any]):
    """Usage of an open episode that notes when it is looked at."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def items(self) -> Any:
        self.seen.append(1)
        return super().items()
