"""One suite for every engine: what the contract in `rollouts/engines/base.py` promises, as checks
of a running engine.

@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_contract(check, tmp_path):
    asyncio.run(run(check, Bench(...)))
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from marlora.agents.types import BASE, Completion, Message, Sampling, SettingError
from marlora.rollouts.engines.base import Engine, EngineError, ModelRef, PromptTooLong
from marlora.rollouts.renderer import ChatRenderer

_NUMBERS = itertools.count()


@dataclass
class Bench:
    """What a suite needs of an engine.

    `start`: gives a running engine. `adapter(name, seed)`: makes the folder of an adapter of that
    name, another for each seed. `tokens`: the chats of the engine's model. `tolerance`: nats by
    which two runs of one forward pass may differ. `owned`: close the engine after each check (a
    shared server stays).
    """

    start: Callable[[], Awaitable[Engine]]
    adapter: Callable[[str, int], Path]
    tokens: ChatRenderer
    tolerance: float = 1e-4
    owned: bool = True
    base: ModelRef = field(default=ModelRef(BASE))

    def prompt(self, text: str = "7+8+5") -> tuple[int, ...]:
        return self.tokens.prompt([Message("system", "first"), Message("user", text)])

    def new_adapter(self, policy: str, seed: int) -> Path:
        return self.adapter(f"{policy}-v{next(_NUMBERS)}-{seed:04x}", seed)


Check = Callable[[Engine, Bench], Awaitable[None]]


async def run(check: Check, bench: Bench) -> None:
    engine = await bench.start()
    try:
        await check(engine, bench)
    finally:
        if bench.owned:
            await engine.close()


def name_of(check: Check) -> str:
    return check.__name__  # type: ignore[attr-defined]


def _sampling(seed: int = 11, **settings: object) -> Sampling:
    return Sampling(**({"max_tokens": 12, "seed": seed} | settings))  # type: ignore[arg-type]


def _ended_well(bench: Bench, reply: Completion, sampling: Sampling) -> None:
    assert reply.finish_reason in ("stop", "length")
    if reply.finish_reason == "length":
        assert len(reply.token_ids) == sampling.max_tokens
    elif not any(stop in reply.text for stop in sampling.stop):
        assert reply.token_ids[-1] in bench.tokens.eos_ids
    assert not any(token in bench.tokens.eos_ids for token in reply.token_ids[:-1])


async def tokens_and_logprobs_are_aligned(engine: Engine, bench: Bench) -> None:
    ids, sampling = bench.prompt(), _sampling(max_tokens=24)
    replies = await engine.generate(ids, bench.base, sampling, n=16)
    assert len(replies) == 16
    for one in replies:
        assert one.prompt_ids == ids and one.token_ids and len(one.token_ids) == len(one.logprobs)
        assert all(value <= 0 for value in one.logprobs)
        assert one.text == bench.tokens.decode(one.token_ids)
        assert (one.policy, one.version) == bench.base
        _ended_well(bench, one, sampling)


async def a_seed_reproduces_and_siblings_differ(engine: Engine, bench: Bench) -> None:
    ids, sampling = bench.prompt(), _sampling(seed=2**61)
    first = await engine.generate(ids, bench.base, sampling, n=6)
    again = await engine.generate(ids, bench.base, sampling, n=6)
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert len({one.token_ids for one in first}) > 1
    (third,) = await engine.generate(ids, bench.base, replace(sampling, seed=2**61 + 2))
    # sibling k draws with seed + k, whatever is sampled beside it
    assert third.token_ids == first[2].token_ids
    others = await asyncio.gather(
        *(engine.generate(bench.prompt(f"{k}+1+1"), bench.base, _sampling(k)) for k in range(4))
    )
    assert all(other[0].prompt_ids == bench.prompt(f"{k}+1+1") for k, other in enumerate(others))


async def temperature_zero_is_greedy(engine: Engine, bench: Bench) -> None:
    sampling = _sampling(temperature=0.0)
    replies = await engine.generate(bench.prompt(), bench.base, sampling, n=3)
    again = await engine.generate(bench.prompt(), bench.base, replace(sampling, seed=5))
    assert len({one.token_ids for one in [*replies, *again]}) == 1


async def length_ends_a_reply(engine: Engine, bench: Bench) -> None:
    for most in (1, 3):
        for one in await engine.generate(
            bench.prompt(), bench.base, _sampling(max_tokens=most), n=8
        ):
            assert len(one.token_ids) <= most
            _ended_well(bench, one, _sampling(max_tokens=most))


async def a_stop_string_ends_a_reply_and_is_kept(engine: Engine, bench: Bench) -> None:
    sampling = _sampling(max_tokens=40)
    for one in await engine.generate(bench.prompt(), bench.base, sampling, n=16):
        places = [
            i
            for i, c in enumerate(one.text)
            if i > 1 and "!" <= c <= "~" and one.text.index(c) == i
        ]
        if places:
            stop = one.text[places[0]]
            seeded = replace(sampling, stop=("not in here", stop), seed=sampling.seed)
            ended = next(
                c
                for c in await engine.generate(bench.prompt(), bench.base, seeded, n=16)
                if stop in c.text
            )
            assert (
                ended.finish_reason == "stop"
                and ended.text.count(stop) == 1
                and ended.text.endswith(stop)
            )
            assert ended.text == bench.tokens.decode(ended.token_ids) and len(
                ended.token_ids
            ) == len(ended.logprobs)
            return
    raise AssertionError("no reply had a character to stop at; the test needs another prompt")


async def the_score_of_a_reply_is_its_logprobs(engine: Engine, bench: Bench) -> None:
    (adapter,) = (await engine.publish({"solver": bench.new_adapter("solver", 1)})).values()
    for ref in (bench.base, ModelRef("solver", adapter)):
        (one,) = await engine.generate(bench.prompt(), ref, _sampling())
        scores = await engine.score(one.prompt_ids + one.token_ids, ref)
        assert len(scores) == len(one.prompt_ids) + len(one.token_ids) - 1
        assert scores[len(one.prompt_ids) - 1 :] == pytest.approx(one.logprobs, abs=bench.tolerance)
    assert await engine.score(bench.prompt()[:1], bench.base) == []
    replica = engine.info().replicas[0]
    assert await engine.score(bench.prompt(), bench.base, replica) == pytest.approx(
        await engine.score(bench.prompt(), bench.base), abs=bench.tolerance
    )


async def adapters_differ(engine: Engine, bench: Bench) -> None:
    team = await engine.publish(
        {"solver": bench.new_adapter("solver", 1), "critic": bench.new_adapter("critic", 2)}
    )
    refs = [
        bench.base,
        ModelRef("solver", ""),
        *(ModelRef(policy, version) for policy, version in team.items()),
    ]
    ids = bench.prompt()
    base, unadapted, solver, critic = await asyncio.gather(
        *(engine.score(ids, ref) for ref in refs)
    )
    assert unadapted == pytest.approx(base, abs=bench.tolerance)
    apart = [
        max(abs(a - b) for a, b in zip(x, y, strict=True))
        for x, y in ((base, solver), (base, critic), (solver, critic))
    ]
    assert min(apart) > 20 * bench.tolerance
    swapped = await engine.publish(
        {"solver": bench.new_adapter("solver", 2)}
    )  # the critic's weights
    assert await engine.score(ids, ModelRef("solver", swapped["solver"])) == pytest.approx(
        critic, abs=bench.tolerance
    )
    replies = await asyncio.gather(*(engine.generate(ids, ref, _sampling(), n=4) for ref in refs))
    for ref, completions in zip(refs, replies, strict=True):
        assert {(one.policy, one.version) for one in completions} == {ref}
        for one in completions:
            scores = await engine.score(one.prompt_ids + one.token_ids, ref)
            assert scores[len(ids) - 1 :] == pytest.approx(one.logprobs, abs=bench.tolerance)


async def the_base_is_the_same_after_adapters_spoke(engine: Engine, bench: Bench) -> None:
    before = await engine.score(bench.prompt(), bench.base)
    team = await engine.publish({"solver": bench.new_adapter("solver", 1)})
    await engine.generate(bench.prompt(), ModelRef("solver", team["solver"]), _sampling())
    assert await engine.score(bench.prompt(), bench.base) == pytest.approx(
        before, abs=bench.tolerance
    )
    await engine.retire(ModelRef("solver", team["solver"]))
    assert await engine.score(bench.prompt(), bench.base) == pytest.approx(
        before, abs=bench.tolerance
    )


async def versions_come_and_go(engine: Engine, bench: Bench) -> None:
    one, two = bench.new_adapter("solver", 1), bench.new_adapter("solver", 2)
    replica = engine.info().replicas[0]
    assert await engine.publish({"solver": one}) == {"solver": one.name}
    assert await engine.publish({"solver": two}) == {"solver": two.name}
    listed = await engine.adapters(replica)
    assert {name: Path(listed[name]) for name in (one.name, two.name)} == {
        one.name: one.resolve(),
        two.name: two.resolve(),
    }
    await engine.retire(ModelRef("solver", one.name))
    listed = await engine.adapters(replica)
    assert one.name not in listed and two.name in listed
    with pytest.raises(EngineError, match=one.name):
        await engine.generate(bench.prompt(), ModelRef("solver", one.name), _sampling())
    assert await engine.generate(bench.prompt(), ModelRef("solver", two.name), _sampling())
    with pytest.raises(EngineError, match="used before"):
        await engine.publish({"solver": one})
    await engine.retire(ModelRef("solver", two.name))
    with pytest.raises(EngineError, match="base cannot be retired"):
        await engine.retire(bench.base)


async def a_version_is_not_retired_under_a_request(engine: Engine, bench: Bench) -> None:
    team = await engine.publish({"solver": bench.new_adapter("solver", 1)})
    ref = ModelRef("solver", team["solver"])
    talking = asyncio.create_task(engine.generate(bench.prompt(), ref, _sampling(), n=4))
    await asyncio.sleep(0)
    await engine.retire(ref)
    assert talking.done() and len(talking.result()) == 4


async def unknown_names_are_errors(engine: Engine, bench: Bench) -> None:
    team = await engine.publish({"solver": bench.new_adapter("solver", 1)})
    for ref in (ModelRef("solver", "solver-v999-beef"), ModelRef("critic", team["solver"])):
        for asked in (
            engine.generate(bench.prompt(), ref, _sampling()),
            engine.score(bench.prompt(), ref),
            engine.retire(ref),
        ):
            with pytest.raises(EngineError, match=ref.version):
                await asked
    with pytest.raises(EngineError, match="moon"):
        await engine.score(bench.prompt(), bench.base, replica="moon")
    with pytest.raises(EngineError, match="moon"):
        await engine.adapters("moon")
    empty = bench.new_adapter("solver", 1)
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(SettingError, match=r"adapter_model\.safetensors"):
        await engine.publish({"solver": empty})


async def what_does_not_fit_is_refused(engine: Engine, bench: Bench) -> None:
    context = engine.info().context
    ids = (bench.prompt() * context)[:context]
    for length, most in ((context, 1), (context - 4, 5)):
        with pytest.raises(PromptTooLong, match=str(context)):
            await engine.generate(ids[:length], bench.base, _sampling(max_tokens=most))
    assert await engine.generate(ids[: context - 2], bench.base, _sampling(max_tokens=2))
    with pytest.raises(EngineError, match="empty prompt"):
        await engine.generate((), bench.base, _sampling())


async def closing_twice_is_fine(engine: Engine, bench: Bench) -> None:
    await engine.close()
    await engine.close()
    with pytest.raises(EngineError):
        await engine.generate(bench.prompt(), bench.base, _sampling())


async def top_k_one_is_certain(engine: Engine, bench: Bench) -> None:
    (greedy,) = await engine.generate(bench.prompt(), bench.base, _sampling(temperature=0.0))
    (narrow,) = await engine.generate(bench.prompt(), bench.base, _sampling(top_k=1))
    assert narrow.token_ids == greedy.token_ids
    assert narrow.logprobs == pytest.approx(
        [0.0] * len(narrow.logprobs), abs=bench.tolerance
    )  # of the processed distribution


async def a_repetition_penalty_forbids_what_was_sampled(engine: Engine, bench: Bench) -> None:
    sampling = _sampling(temperature=0.0, presence_penalty=1000.0)
    (reply,) = await engine.generate(bench.prompt(), bench.base, sampling)
    assert len(set(reply.token_ids)) == len(reply.token_ids)


CHECKS: list[Check] = [  # every engine
    tokens_and_logprobs_are_aligned,
    a_seed_reproduces_and_siblings_differ,
    temperature_zero_is_greedy,
    length_ends_a_reply,
    a_stop_string_ends_a_reply_and_is_kept,
    the_score_of_a_reply_is_its_logprobs,
    adapters_differ,
    the_base_is_the_same_after_adapters_spoke,
    versions_come_and_go,
    a_version_is_not_retired_under_a_request,
    unknown_names_are_errors,
    what_does_not_fit_is_refused,
]
MODEL_CHECKS: list[Check] = [
    top_k_one_is_certain,
    a_repetition_penalty_forbids_what_was_sampled,
]  # engines that have a model
OWNED_CHECKS: list[Check] = [closing_twice_is_fine]  # engines that the test may close
