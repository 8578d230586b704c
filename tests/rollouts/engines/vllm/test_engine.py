"""The vLLM client against a scripted server: what it asks, what it believes, what it does when
things break."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef, PromptTooLong
from marlora.rollouts.engines.vllm.discovery import key_from, open_routes, tidy
from marlora.rollouts.engines.vllm.engine import Routes, VLLMEngine
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from tests.rollouts.fake_vllm import FakeVLLM, Tokens, sampled, table

KEY = "k" * 20
BASE = ModelRef("base")
QUICK = ReplicaPolicy(retries=3, backoff=0.01, longest=0.02, request=10.0, stall=0.3, probe=0.2)
DRAW = Sampling(max_tokens=6, seed=100)
PROMPT = [3, 9, 4]


def engine_on(*fakes: FakeVLLM, root: str | Path = "/nowhere", **settings: Any) -> VLLMEngine:
    return VLLMEngine(
        [fake.url for fake in fakes],
        Tokens(),
        adapter_root=root,
        **({"key": KEY, "retry": QUICK} | settings),
    )


def play(engine: VLLMEngine, work: Callable[[VLLMEngine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def generate(fake: FakeVLLM, sampling: Sampling = DRAW, n: int = 1) -> Any:
    return play(engine_on(fake), lambda engine: engine.generate(PROMPT, BASE, sampling, n))


def adapter(root: Path, name: str, rank: int = 4) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


# what is asked and what is returned


def test_every_sampling_field_is_sent():
    sampling = Sampling(0.7, 0.9, 20, 0.05, 1.1, 0.2, 0.3, 6, ("END",), 100)
    with FakeVLLM(key=KEY) as fake:
        generate(fake, sampling, n=2)
        assert fake.completions() == [
            {
                "model": "served-base",
                "prompt": PROMPT,
                "n": 2,
                "seed": 100,
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.2,
                "frequency_penalty": 0.3,
                "max_tokens": 6,
                "min_tokens": 0,
                "stop": ["END"],
                "include_stop_str_in_output": True,
                "ignore_eos": True,
                "stop_token_ids": [1],
                "skip_special_tokens": False,
                "logprobs": 0,
                "return_token_ids": True,
                "stream": False,
            }
        ]


def test_grammar_and_bias_are_sent_where_they_are_set():
    with FakeVLLM(key=KEY) as fake:
        generate(
            fake,
            Sampling(
                max_tokens=6,
                seed=1,
                grammar='{"json": {"type": "object"}}',
                logit_bias={"7": -100.0},
            ),
        )
        (body,) = fake.completions()
        assert body["structured_outputs"] == {"json": {"type": "object"}} and body[
            "logit_bias"
        ] == {"7": -100.0}


def test_ids_and_logprobs_belong_together_and_text_is_ours():
    with FakeVLLM(key=KEY) as fake:
        first, second = generate(fake, n=2)
    assert first.token_ids == tuple(sampled("served-base", PROMPT, 100, 6))
    assert second.token_ids == tuple(
        sampled("served-base", PROMPT, 101, 6)
    )  # sibling k draws with seed + k
    assert first.logprobs == tuple(table(token) for token in first.token_ids)
    assert first.text == "".join(f"<{token}>" for token in first.token_ids)
    assert first.prompt_ids == tuple(PROMPT)
    assert (first.policy, first.version) == ("base", "")


def test_greedy_siblings_are_one_request():
    with FakeVLLM(key=KEY) as fake:
        replies = generate(fake, Sampling(temperature=0.0, max_tokens=4, seed=5), n=3)
        assert len(replies) == 3 and len(set(replies)) == 1
        assert [body["n"] for body in fake.completions()] == [1]


def test_a_request_without_a_seed_gets_one_that_its_retry_repeats():
    with FakeVLLM(key=KEY, faults=["500"]) as fake:
        generate(fake, Sampling(max_tokens=4))
        generate(fake, Sampling(max_tokens=4))
        seeds = [body["seed"] for body in fake.completions()]
    assert seeds[0] == seeds[1] != seeds[2]


def test_score_gives_the_logprobs_of_the_prompt_itself():
    with FakeVLLM(key=KEY) as fake:
        assert play(engine_on(fake), lambda engine: engine.score(PROMPT, BASE)) == [
            table(9),
            table(4),
        ]
        assert fake.completions()[0]["temperature"] == 1.0


def test_too_long_prompts_are_refused_before_they_are_sent():
    with FakeVLLM(key=KEY, context=8) as fake:
        with pytest.raises(PromptTooLong, match="context of 8"):
            generate(fake, Sampling(max_tokens=6))
        with pytest.raises(PromptTooLong, match="context of 8"):
            play(engine_on(fake), lambda engine: engine.score([2] * 8, BASE))
        assert fake.completions() == []


# when things break

ONCE = [
    "500",
    "503",
    "429",
    "reset",
    "half",
    "garbage",
    "list",
    "short",
    "long",
    "nan",
    "no logprobs",
]


@pytest.mark.parametrize("fault", [*ONCE, "extra choice", "twice", "other prompt", "abort"])
def test_one_fault_changes_nothing(fault: str):
    with FakeVLLM(key=KEY) as fake:
        expected = generate(fake, n=2)
        fake.faults.append(fault)
        assert generate(fake, n=2) == expected
        bodies = fake.completions()
        assert len(bodies) == 3 and bodies[1] == bodies[2]  # the same request, seed and all


@pytest.mark.parametrize("fault", ["500", "reset", "short"])
def test_retries_end_with_an_error_that_names_the_server(fault: str):
    with FakeVLLM(key=KEY, faults=[fault] * 10) as fake:
        with pytest.raises(EngineError, match=rf"{fake.url}.*failed 4 times"):
            generate(fake)
        assert len(fake.completions()) == 4


def test_another_model_in_the_reply_is_fatal_at_once():
    with FakeVLLM(key=KEY, faults=["other model"]) as fake:
        with pytest.raises(
            EngineError, match="asked for 'served-base', answered by 'served-base-2'"
        ):
            generate(fake)
        assert len(fake.completions()) == 1


def test_a_refusal_is_not_repeated_and_says_why():
    with FakeVLLM(key=KEY, faults=["400"]) as fake:
        with pytest.raises(EngineError, match="HTTP 400: scripted 400"):
            generate(fake)
        assert len(fake.completions()) == 1


def test_a_slow_try_is_given_up_and_repeated():
    policy = ReplicaPolicy(retries=1, backoff=0.01, request=0.2, stall=60.0)
    with FakeVLLM(key=KEY, faults=["slow"]) as fake:
        [reply] = play(
            engine_on(fake, retry=policy), lambda engine: engine.generate(PROMPT, BASE, DRAW)
        )
        assert reply.token_ids == tuple(sampled("served-base", PROMPT, 100, 6))
        assert len(fake.completions()) == 2


def test_a_server_whose_health_is_fine_but_computes_nothing_is_dead():
    with FakeVLLM(key=KEY) as fake:
        fake.dead = True
        with pytest.raises(
            EngineError,
            match=rf"{fake.url}.*no request finished and no token came.*one token could not",
        ):
            generate(fake)
        assert [body["max_tokens"] for body in fake.completions()] == [6, 1]  # ours, then the probe


def test_a_busy_server_is_not_dead():
    with FakeVLLM(key=KEY) as fake:
        fake.busy = True

        async def work(engine: VLLMEngine) -> Any:
            asking = asyncio.ensure_future(engine.generate(PROMPT, BASE, DRAW))
            await asyncio.sleep(4 * QUICK.stall)
            assert not asking.done()
            fake.busy = False
            return await asking

        assert len(play(engine_on(fake), work)) == 1
        assert len(fake.completions()) == 1


def test_sixty_four_requests_at_once_with_faults_between():
    with FakeVLLM(key=KEY, faults=["500", "reset", "half", "short", "429"]) as fake:

        async def work(engine: VLLMEngine) -> Any:
            return await asyncio.gather(*(engine.generate([2, k], BASE, DRAW) for k in range(64)))

        replies = play(engine_on(fake), work)
    assert [reply.token_ids for [reply] in replies] == [
        tuple(sampled("served-base", [2, k], 100, 6)) for k in range(64)
    ]


def test_cancelling_a_request_is_no_failure_of_the_server():
    with FakeVLLM(key=KEY) as fake:
        fake.dead = True

        async def work(engine: VLLMEngine) -> None:
            asking = asyncio.ensure_future(engine.generate(PROMPT, BASE, DRAW))
            await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

        play(engine_on(fake), work)


def test_an_engine_outlives_an_event_loop():
    with FakeVLLM(key=KEY) as fake:
        engine = engine_on(fake)
        first = asyncio.run(engine.generate(PROMPT, BASE, DRAW))
        assert play(engine, lambda engine: engine.generate(PROMPT, BASE, DRAW)) == first


def test_retries_do_not_touch_the_global_random_state():
    with FakeVLLM(key=KEY, faults=["500", "500"]) as fake:
        state = random.getstate()
        generate(fake)
        assert random.getstate() == state


# versions


def test_publish_reaches_every_replica_and_replies_carry_the_version(tmp_path: Path):
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:

        async def work(engine: VLLMEngine) -> Any:
            assert await engine.publish({"solver": folder}) == {"solver": "solver-v1-aa"}
            listed = [await engine.adapters(name) for name in engine.info().replicas]
            [reply] = await engine.generate(PROMPT, ModelRef("solver", "solver-v1-aa"), DRAW)
            return listed, reply

        listed, reply = play(engine_on(one, two, root=tmp_path), work)
        assert listed == [{"solver-v1-aa": str(folder)}] * 2 == [one.loaded, two.loaded]
        assert (reply.policy, reply.version) == ("solver", "solver-v1-aa")
        assert reply.token_ids == tuple(sampled("solver-v1-aa", PROMPT, 100, 6))
        loads = [body for path, _, body in one.requests if path == "/v1/load_lora_adapter"]
        assert [body for body in loads if body] == [
            {"lora_name": "solver-v1-aa", "lora_path": str(folder)}
        ]  # never in place


def test_an_unknown_or_retired_version_is_an_error_and_never_the_base(tmp_path: Path):
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY) as fake:

        async def work(engine: VLLMEngine) -> None:
            with pytest.raises(EngineError, match=r"'solver-v1-ab'.*never published"):
                await engine.generate(PROMPT, ModelRef("solver", "solver-v1-ab"), DRAW)
            await engine.publish({"solver": folder})
            await engine.retire(ModelRef("solver", "solver-v1-aa"))
            with pytest.raises(EngineError, match="retired"):
                await engine.generate(PROMPT, ModelRef("solver", "solver-v1-aa"), DRAW)
            with pytest.raises(EngineError, match="used before"):
                await engine.publish({"solver": folder})

        play(engine_on(fake, root=tmp_path), work)
        assert fake.loaded == {} and fake.completions() == []


def test_retire_waits_for_a_slow_request_across_five_publishes(tmp_path: Path):
    folders = [adapter(tmp_path, f"solver-v{k}-aa") for k in range(6)]
    with FakeVLLM(key=KEY) as fake:
        fake.held.add("solver-v0-aa")

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folders[0]})
            slow = asyncio.ensure_future(
                engine.generate(PROMPT, ModelRef("solver", "solver-v0-aa"), DRAW)
            )
            await asyncio.sleep(0.05)
            retiring = asyncio.ensure_future(engine.retire(ModelRef("solver", "solver-v0-aa")))
            for k in range(1, 6):
                await engine.publish({"solver": folders[k]})
                if k > 1:
                    await engine.retire(ModelRef("solver", f"solver-v{k - 1}-aa"))
            assert not retiring.done() and "solver-v0-aa" in fake.loaded
            fake.hold.set()
            await retiring
            assert slow.done() and (await slow)[0].version == "solver-v0-aa"
            assert set(fake.loaded) == {"solver-v5-aa"}

        play(engine_on(fake, root=tmp_path, retry=ReplicaPolicy(stall=60.0)), work)


def test_a_load_whose_answer_was_lost_is_not_an_error(tmp_path: Path):
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY, faults=["load lost"]) as fake:
        assert play(
            engine_on(fake, root=tmp_path), lambda engine: engine.publish({"solver": folder})
        ) == {"solver": "solver-v1-aa"}


def bad_folders(root: Path) -> dict[str, Path]:
    outside = adapter(root / "elsewhere", "out-v1-aa")
    extra = adapter(root / "versions", "extra-v1-aa")
    (extra / "adapter_model.bin").write_bytes(b"pickle")
    linked = adapter(root / "versions", "linked-v1-aa")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "versions" / "link-v1-aa").symlink_to(outside)
    dots = root / "versions" / ".." / "elsewhere" / "out-v1-aa"
    return {
        "outside": outside,
        "extra": extra,
        "linked": linked,
        "link": root / "versions" / "link-v1-aa",
        "dots": dots,
    }


@pytest.mark.parametrize("kind", ["outside", "extra", "linked", "link", "dots", "missing"])
def test_only_plain_adapter_folders_inside_the_root_are_loaded(tmp_path: Path, kind: str):
    folder = {**bad_folders(tmp_path), "missing": tmp_path / "versions" / "missing"}[kind]
    with FakeVLLM(key=KEY) as fake:
        with pytest.raises(SettingError, match=r"adapter .*expected"):
            play(
                engine_on(fake, root=tmp_path / "versions"),
                lambda engine: engine.publish({"solver": folder}),
            )
        assert fake.loaded == {}


# replicas


def test_a_chat_stays_on_its_replica_and_new_chats_spread():
    routes = Routes()
    shots = list(range(20))  # few-shot examples that every chat begins with
    assert routes.choose("solver", [*shots, 91], {"a": 0, "b": 0}) == "a"
    assert routes.choose("solver", [*shots, 92], {"a": 1, "b": 0}) == "b"
    assert routes.choose("solver", [*shots, 92], {"a": 0, "b": 9}) == "b"  # the same prompt again
    assert (
        routes.choose("solver", [*shots, 91, 5, 6, 7], {"a": 9, "b": 0}) == "a"
    )  # the chat goes on
    assert routes.choose("solver", [*shots, 91, 5, 6, 7, 8], {"a": 9, "b": 0}) == "a"
    assert (
        routes.choose("critic", [*shots, 91, 5], {"a": 9, "b": 0}) == "b"
    )  # another policy's cache is another one


def test_requests_go_to_all_replicas():
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:

        async def work(engine: VLLMEngine) -> None:
            await asyncio.gather(*(engine.generate([2, k], BASE, DRAW) for k in range(10)))

        play(engine_on(one, two), work)
        assert len(one.completions()) == len(two.completions()) == 5


# servers that others run


def test_an_open_server_is_refused_by_naming_its_open_routes():
    with FakeVLLM(
        key=KEY, open_routes={"/invocations"}
    ) as fake:  # what vLLM's own --api-key leaves
        with pytest.raises(SettingError, match=r"is open.*POST /invocations.*allow_open_server"):
            engine_on(fake)
        engine_on(fake, allow_open_server=True)
    with FakeVLLM(key=KEY) as fake:
        assert open_routes(fake.url) == []


def test_the_key_is_sent_and_a_wrong_one_is_an_error_at_once():
    with FakeVLLM(key=KEY) as fake:
        generate(fake)
        assert {key for path, key, body in fake.requests if body and path == "/v1/completions"} == {
            f"Bearer {KEY}"
        }
        with pytest.raises(EngineError, match="HTTP 401; is the key right"):
            engine_on(fake, key="wrong")


def test_nobody_at_the_url_is_a_clear_error():
    with FakeVLLM() as fake:
        url = fake.url
    with pytest.raises(SettingError, match=f"no answer from {url}"):
        VLLMEngine([url], Tokens(), adapter_root="/nowhere")
    with pytest.raises(EngineError, match=f"{url}: no answer"):
        VLLMEngine([url], Tokens(), adapter_root="/nowhere", allow_open_server=True)


def test_urls_and_keys_from_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert tidy("http://host:8000/v1/") == "http://host:8000"
    with pytest.raises(SettingError, match="server_urls"):
        tidy("host:8000")
    file = tmp_path / "key"
    file.write_text("s" * 20)
    file.chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        key_from(str(file))
    file.chmod(0o600)
    assert key_from(str(file)) == "s" * 20
    monkeypatch.setenv("SOME_KEY", "from the environment")
    assert key_from("SOME_KEY") == "from the environment"
