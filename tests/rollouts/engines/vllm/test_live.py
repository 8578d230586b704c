"""The vLLM engine on a real server: what the scripted one cannot show."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import EngineError, ModelRef, PromptTooLong
from marlora.rollouts.engines.vllm.auth import ROUTES
from marlora.rollouts.engines.vllm.discovery import open_routes
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from marlora.rollouts.engines.vllm.server import VLLMServer
from marlora.rollouts.http import fetch
from tests.live_server import CONTEXT, Live, settings_for
from tests.rollouts.engine_conformance import (
    CHECKS,
    OWNED_CHECKS,
    Bench,
    Check,
    name_of,
    run,
    top_k_one_is_certain,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
BASE = ModelRef("base")
PROMPT = [3, *range(40, 90), 1, 4]
DRAW = Sampling(max_tokens=16, seed=11)
DEVELOPER = [
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("POST", "/collective_rpc"),
    ("GET", "/server_info"),
]


def play(live: Live, work: Callable[[VLLMEngine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        engine = live.engine()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("check", [*CHECKS, *OWNED_CHECKS, top_k_one_is_certain], ids=name_of)
def test_contract(check: Check, server: Live):
    async def start() -> VLLMEngine:
        return server.engine()

    asyncio.run(run(check, Bench(start, server.adapter, server.tokens, tolerance=1e-3)))


def routes(live: Live) -> list[tuple[str, str]]:
    """Every route of the server, from the list vLLM writes to its log as it starts."""
    entries = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", live.server.log.read_text())
    return [
        (method, re.sub(r"\{.*?\}", "x", path))
        for path, methods in entries
        for method in methods.strip().split(", ")
    ]


def test_every_route_asks_for_the_key(server: Live):
    served = routes(server)
    assert {
        ("POST", "/invocations"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/x"),
        ("POST", "/v1/completions"),
    } <= set(served)
    assert set(served) >= ROUTES and len(served) > 30
    url = server.server.url
    for method, path in [*served, *DEVELOPER]:
        expected = 200 if (method, path) == ("GET", "/health") else 401
        body = {} if method == "POST" else None
        assert fetch(url + path, "", method, body)[0] == expected, f"{method} {path}"
        assert fetch(url + path, "0" * 64, method, body)[0] == expected, f"{method} {path}"
        if (method, path) not in ROUTES | {("GET", "/health")}:
            assert fetch(url + path, server.server.key, method, body)[0] == 403, f"{method} {path}"
    assert open_routes(url) == []


def test_the_key_is_on_no_command_line_and_in_no_environment(server: Live):
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                text = (process / name).read_bytes()
            except OSError:
                continue
            assert server.server.key.encode() not in text, f"{process.name} {name}"


def test_a_hostile_generation_config_changes_nothing(server: Live):
    """Sampled log-probs are those of the plain softmax, and token 40, which that file calls an end,
    ends no reply."""

    async def work(engine: VLLMEngine) -> None:
        replies = await engine.generate(PROMPT, BASE, Sampling(max_tokens=200, seed=1), n=16)
        assert len({reply.token_ids for reply in replies}) == 16
        assert any(40 in reply.token_ids[:-1] for reply in replies)
        for reply in replies[:4]:
            scored = await engine.score([*PROMPT, *reply.token_ids], BASE)
            assert scored[len(PROMPT) - 1 :] == pytest.approx(reply.logprobs, abs=1e-3)

    play(server, work)


def test_a_reply_ends_with_the_token_that_ended_it(server: Live):
    replies = play(
        server, lambda engine: engine.generate(PROMPT, BASE, Sampling(max_tokens=300, seed=2), n=16)
    )
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert (reply.finish_reason == "stop") == (reply.token_ids[-1] == 1)
        assert 1 not in reply.token_ids[:-1]
        assert len(reply.logprobs) == len(reply.token_ids)
        assert reply.text == server.tokens.decode(reply.token_ids)


def test_a_stop_string_is_kept(server: Live):
    [free] = play(
        server, lambda engine: engine.generate(PROMPT, BASE, Sampling(max_tokens=60, seed=4))
    )
    word = next(
        char
        for char in free.text[8:]
        if char.isascii() and char.isalnum() and char not in free.text[:4]
    )
    [cut] = play(
        server,
        lambda engine: engine.generate(PROMPT, BASE, Sampling(max_tokens=60, seed=4, stop=(word,))),
    )
    assert cut.finish_reason == "stop" and cut.text.endswith(word)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < len(
        free.token_ids
    )


def test_a_reply_is_held_to_a_grammar_or_biased(server: Live):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 9, "minimum": 1}},
        "required": ["sum"],
    }
    held = Sampling(
        max_tokens=200,
        seed=1,
        grammar=json.dumps({"json": {**schema, "additionalProperties": False}}),
    )
    chosen = Sampling(max_tokens=20, seed=2, grammar=json.dumps({"choice": ["yes", "no"]}))
    biased = Sampling(max_tokens=5, seed=3, logit_bias={"40": 100.0})

    async def work(engine: VLLMEngine) -> Any:
        return [
            (await engine.generate(PROMPT, BASE, sampling))[0]
            for sampling in (held, chosen, biased)
        ]

    structured, choice, same = play(server, work)
    if structured.finish_reason == "stop":  # a random model may go on with white space
        assert 1 <= json.loads(structured.text)["sum"] <= 9
    assert structured.text.lstrip().startswith("{") and choice.finish_reason == "stop"
    # the hostile generation config calls token 40 an end, and with a grammar vLLM believes it
    assert choice.text.removesuffix(server.tokens.decode([40])) in ("yes", "no")
    assert same.token_ids == (40,) * 5


def test_seeds_reproduce_alone_and_together(server: Live):
    draws = [([*PROMPT, k], Sampling(max_tokens=16, seed=1000 + 7 * k)) for k in range(32)]

    async def alone(engine: VLLMEngine) -> Any:
        return [await engine.generate(ids, BASE, sampling) for ids, sampling in draws[:8]]

    async def together(engine: VLLMEngine) -> Any:
        return await asyncio.gather(
            *(engine.generate(ids, BASE, sampling) for ids, sampling in draws)
        )

    first, second, third = play(server, alone), play(server, together), play(server, together)
    tokens = [[reply.token_ids for reply in replies] for replies in second]
    assert tokens[:8] == [[reply.token_ids for reply in replies] for replies in first]
    assert tokens == [[reply.token_ids for reply in replies] for replies in third]
    assert len({reply[0] for reply in tokens}) == 32


def test_more_prompt_tokens_than_one_step_reads(server: Live):
    """25 thousand tokens at once, with seeds: vLLM on a CPU dies of a seeded prompt that it reads
    in two parts."""
    draws = [
        ([3 + (k + j * j) % 250 for j in range(400)], Sampling(max_tokens=4, seed=k))
        for k in range(64)
    ]

    async def work(engine: VLLMEngine) -> None:
        together = await asyncio.gather(
            *(engine.generate(ids, BASE, sampling) for ids, sampling in draws)
        )
        for k in (0, 31, 63):
            [alone] = await engine.generate(draws[k][0], BASE, draws[k][1])
            assert together[k][0].token_ids == alone.token_ids

    play(server, work)


def test_siblings_draw_with_the_next_seeds(server: Live):
    async def work(engine: VLLMEngine) -> None:
        together = await engine.generate(PROMPT, BASE, DRAW, n=3)
        apart = [
            (await engine.generate(PROMPT, BASE, Sampling(max_tokens=16, seed=11 + k)))[0]
            for k in range(3)
        ]
        assert [reply.token_ids for reply in together] == [reply.token_ids for reply in apart]
        assert len({reply.token_ids for reply in together}) == 3
        greedy = await engine.generate(
            PROMPT, BASE, Sampling(temperature=0.0, max_tokens=5, seed=1), n=2
        )
        assert greedy[0] == greedy[1]

    play(server, work)


def test_sampled_logprobs_are_those_at_the_temperature_of_the_draw(server: Live):
    import torch
    from transformers import AutoModelForCausalLM

    [reply] = play(
        server,
        lambda engine: engine.generate(
            PROMPT, BASE, Sampling(temperature=0.6, max_tokens=16, seed=5)
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(server.model)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *reply.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits / 0.6, -1).gather(
        1, torch.tensor(reply.token_ids)[:, None]
    )[:, 0]
    assert list(reply.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)


def peft_scores(live: Live, folder: Path | None, ids: list[int]) -> list[float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(live.model)
    model = PeftModel.from_pretrained(model, str(folder)) if folder else model
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def test_each_policy_is_served_with_its_own_adapter(server: Live):
    """Two adapters and the base, asked for at once: each has the log-probs PEFT gives it."""
    folders = {
        "solver": server.adapter("solver-v1-live", 1),
        "critic": server.adapter("critic-v1-live", 2),
    }

    async def work(engine: VLLMEngine) -> Any:
        version = await engine.publish(folders)
        assert version == {"solver": "solver-v1-live", "critic": "critic-v1-live"}
        listed = await engine.adapters(server.server.name)
        assert {name: listed[name] for name in version.values()} == {
            folder.name: str(folder) for folder in folders.values()
        }
        refs = [BASE, *(ModelRef(policy, name) for policy, name in version.items())]
        scores = await asyncio.gather(*(engine.score(PROMPT, ref) for ref in refs))
        replies = await asyncio.gather(*(engine.generate(PROMPT, ref, DRAW) for ref in refs))
        for ref, [reply] in zip(refs, replies, strict=True):
            assert (reply.policy, reply.version) == ref
            seen = (await engine.score([*PROMPT, *reply.token_ids], ref))[len(PROMPT) - 1 :]
            assert seen == pytest.approx(
                reply.logprobs, abs=1e-3
            )  # the prompt just served, so its cache is hit
        return scores

    base, solver, critic = play(server, work)
    assert base == pytest.approx(peft_scores(server, None, PROMPT), abs=1e-3)
    assert solver == pytest.approx(peft_scores(server, folders["solver"], PROMPT), abs=1e-3)
    assert critic == pytest.approx(peft_scores(server, folders["critic"], PROMPT), abs=1e-3)
    for one, other in ((base, solver), (base, critic), (solver, critic)):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


def test_a_retired_version_is_gone_from_the_server(server: Live):
    folder = server.adapter("solver-v2-live", 3)

    async def work(engine: VLLMEngine) -> None:
        await engine.publish({"solver": folder})
        await engine.retire(ModelRef("solver", "solver-v2-live"))
        assert "solver-v2-live" not in await engine.adapters(server.server.name)
        with pytest.raises(EngineError, match="retired"):
            await engine.generate(PROMPT, ModelRef("solver", "solver-v2-live"), DRAW)

    play(server, work)
    body = {"model": "solver-v2-live", "prompt": PROMPT, "max_tokens": 1}
    assert fetch(f"{server.server.url}/v1/completions", server.server.key, "POST", body)[0] == 404


def test_more_versions_than_slots_go_through(server: Live):
    """Nine versions one after the other, through a cache of seven."""
    folders = [server.adapter(f"critic-v{k}-many", 20 + k) for k in range(9)]

    async def work(engine: VLLMEngine) -> Any:
        scores = []
        for folder in folders:
            await engine.publish({"critic": folder})
            scores.append(await engine.score(PROMPT, ModelRef("critic", folder.name)))
            await engine.retire(ModelRef("critic", folder.name))
        return scores

    scores = play(server, work)
    for k in (0, 8):
        assert scores[k] == pytest.approx(peft_scores(server, folders[k], PROMPT), abs=1e-3)


def test_the_base_stays_the_base_beside_adapters_in_every_slot(server: Live):
    """vLLM 0.32 on a CPU gives base requests the adapter of the last slot; our workers' LoRA does
    not."""
    folders = [
        server.adapter(f"solver-v{k}-slots", 40 + k) for k in range(6)
    ]  # the server has five slots

    async def work(engine: VLLMEngine) -> Any:
        refs = []
        for folder in folders:
            await engine.publish({"solver": folder})
            refs.append(ModelRef("solver", folder.name))
        await asyncio.gather(*(engine.generate(PROMPT, ref, DRAW) for ref in refs))
        together = await asyncio.gather(
            *(engine.generate(PROMPT, ref, DRAW) for ref in [BASE, refs[0], BASE, refs[1]])
        )
        return together, await engine.generate(PROMPT, BASE, DRAW)

    together, [alone] = play(server, work)
    for place in (0, 2):
        [beside] = together[place]
        assert beside.token_ids == alone.token_ids
        assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_the_context_is_used_to_its_end(server: Live):
    long = [3] * (CONTEXT - 4)

    async def work(engine: VLLMEngine) -> None:
        assert engine.info().context == CONTEXT
        assert (
            len((await engine.generate(long, BASE, Sampling(max_tokens=4, seed=0)))[0].token_ids)
            == 4
        )
        assert len(await engine.score([3] * (CONTEXT - 1), BASE)) == CONTEXT - 2
        with pytest.raises(PromptTooLong):
            await engine.generate(long, BASE, Sampling(max_tokens=5, seed=0))

    play(server, work)


def test_a_token_outside_the_vocabulary_is_refused_with_the_servers_words(server: Live):
    with pytest.raises(EngineError, match=r"HTTP 400: .*9999"):
        play(server, lambda engine: engine.generate([9999], BASE, DRAW))


def engine_processes(server: VLLMServer) -> list[int]:
    """The server's processes below its front: those that compute."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    front = next(pid for pid, parent in parents.items() if parent == server.supervisor_pid)
    below = [pid for pid, parent in parents.items() if parent == front]
    return below + [pid for pid, parent in parents.items() if parent in below]


@pytest.mark.slow
def test_a_dead_engine_is_started_again_and_then_named_with_the_end_of_its_log(
    server: Live, tmp_path: Path
):
    """Killed while it serves: the requests get what they would have got. Killed once more: the run
    stops and shows the log."""
    folder = server.adapter("solver-v1-death", 7)
    ref, draws = (
        ModelRef("solver", folder.name),
        [Sampling(max_tokens=300, seed=k) for k in range(8)],
    )

    async def publish_and_ask(engine: VLLMEngine) -> Any:
        await engine.publish({"solver": folder})
        return await asyncio.gather(*(engine.generate(PROMPT, ref, draw) for draw in draws))

    expected = play(server, publish_and_ask)
    second = VLLMServer(
        settings_for(server.model, tmp_path, max_restarts=1, label="second")
    ).start()
    pids = engine_processes(second)
    assert pids
    engine = VLLMEngine(
        [second], server.tokens, adapter_root=server.root, retry=ReplicaPolicy(stall=30.0)
    )

    async def run() -> None:
        await engine.publish({"solver": folder})
        asking = [asyncio.ensure_future(engine.generate(PROMPT, ref, draw)) for draw in draws]
        await asyncio.sleep(0.05)
        os.kill(pids[-1], signal.SIGKILL)
        replies = await asyncio.gather(*asking)
        assert [reply.token_ids for [reply] in replies] == [reply.token_ids for [reply] in expected]
        assert await engine.adapters("second-0") == {folder.name: str(folder)}
        os.kill(engine_processes(second)[-1], signal.SIGKILL)
        with pytest.raises(
            EngineError,
            match=r"second-0 .* is dead(.|\n)*End of .*second-0\.log(.|\n)*EngineDeadError",
        ):
            await engine.generate(PROMPT, ref, DRAW)

    try:
        asyncio.run(run())
    finally:
        second.stop()
    assert not second.alive
