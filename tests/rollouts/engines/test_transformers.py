"""The in-process engine: the contract, exact distributions, and runs that repeat bit for bit."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import TeamState
from marlora.agents.types import BASE, AgentSpec, Completion, Message, Sampling, SettingError, Task
from marlora.rollouts.engines.base import EngineError, ModelRef, PromptTooLong
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.engines.transformers_batch import ContinuousBatch
from marlora.rollouts.engines.transformers_sampler import Sampler, shape_logits
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRunner, episode_requests
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.rollouts.engine_conformance import (
    CHECKS,
    MODEL_CHECKS,
    OWNED_CHECKS,
    Bench,
    Check,
    name_of,
    run,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens(model: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(model))


def adapter_maker(model: Path, root: Path) -> Callable[[str, int], Path]:
    def make(name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model)
        peft = get_peft_model(
            base,
            LoraConfig(
                r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            ),
        )
        peft.save_pretrained(root / "save")
        (root / "save" / "README.md").unlink(missing_ok=True)
        return (root / "save").rename(root / name)

    return make


def play(engine: TransformersEngine, *calls: object) -> list[list[Completion]]:
    async def all_of_them() -> list[list[Completion]]:
        try:
            return list(await asyncio.gather(*(engine.generate(*call) for call in calls)))  # type: ignore[misc]
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("check", CHECKS + MODEL_CHECKS + OWNED_CHECKS, ids=name_of)
def test_contract(check: Check, model: Path, tokens: ChatRenderer, tmp_path: Path) -> None:
    async def start() -> TransformersEngine:
        return TransformersEngine(model, tokens=tokens, max_batch=8)

    asyncio.run(run(check, Bench(start, adapter_maker(model, tmp_path), tokens)))


def test_replies_end_by_token_and_by_length(model: Path, tokens: ChatRenderer) -> None:
    prompt = tokens.prompt([Message("user", "7+8+5")])
    (replies,) = play(
        TransformersEngine(model, tokens=tokens),
        (prompt, ModelRef(BASE), Sampling(max_tokens=32, seed=3), 64),
    )
    assert {one.finish_reason for one in replies} == {"stop", "length"}
    stopped = [one for one in replies if one.finish_reason == "stop"]
    assert all(one.token_ids[-1] == 1 and not one.text.endswith("<|end|>") for one in stopped)


def test_logprobs_are_those_of_the_plain_model(model: Path, tokens: ChatRenderer) -> None:
    """Whatever it is padded, batched and compacted with, a reply's log-probs are those of one
    unpadded forward pass."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    prompts = [tokens.prompt([Message("user", "1" * length)]) for length in (1, 5, 30, 9)]
    calls = [
        (prompt, ModelRef(BASE), Sampling(temperature=0.7, max_tokens=24, seed=i), 4)
        for i, prompt in enumerate(prompts)
    ]
    for replies in play(TransformersEngine(model, tokens=tokens), *calls):
        for one in replies:
            ids = torch.tensor([one.prompt_ids + one.token_ids])
            with torch.no_grad():
                expected = torch.log_softmax(plain(input_ids=ids).logits[0, :-1] / 0.7, -1).gather(
                    1, ids[0, 1:, None]
                )[:, 0]
            assert list(one.logprobs) == pytest.approx(
                expected[len(one.prompt_ids) - 1 :].tolist(), abs=2e-5
            )


def test_tokens_follow_their_distribution(model: Path, tokens: ChatRenderer) -> None:
    prompt = tokens.prompt([Message("user", "7")])
    (replies,) = play(
        TransformersEngine(model, tokens=tokens, max_batch=512),
        (prompt, ModelRef(BASE), Sampling(max_tokens=1, seed=0), 4000),
    )
    plain = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    observed = (
        torch.bincount(torch.tensor([one.token_ids[0] for one in replies]), minlength=len(expected))
        / 4000
    )
    assert (
        float((observed - expected).abs().sum()) / 2
        < 3 * float((expected * (1 - expected) / 4000).sqrt().sum()) / 2
    )
    assert float((observed - torch.roll(expected, 1)).abs().sum()) / 2 > 0.2  # the test can fail


def test_penalties_and_cuts_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))

    def probabilities(
        prompt: tuple[int, ...] = (), sampled: tuple[int, ...] = (), **settings: float
    ) -> list[float]:
        shaped = shape_logits(logits, Sampling(**settings), [prompt], [sampled])  # type: ignore[arg-type]
        return [round(p, 4) for p in shaped.softmax(-1)[0].tolist()]

    assert probabilities() == [0.5, 0.25, 0.15, 0.1]
    assert probabilities(top_k=2) == [0.6667, 0.3333, 0, 0]
    assert probabilities(top_p=0.7) == [0.6667, 0.3333, 0, 0]
    assert probabilities(min_p=0.25) == [0.5556, 0.2778, 0.1667, 0]
    assert probabilities(temperature=0.5) == [0.7246, 0.1812, 0.0652, 0.029]  # squares / 0.345
    assert probabilities(sampled=(0, 0), frequency_penalty=float(torch.log(torch.tensor(2.0)))) == [
        0.2,
        0.4,
        0.24,
        0.16,
    ]  # 0.5 / 4
    assert probabilities(prompt=(0,), presence_penalty=9.0) == [
        0.5,
        0.25,
        0.15,
        0.1,
    ]  # only what was sampled counts
    assert probabilities(sampled=(0, 0), presence_penalty=float(torch.log(torch.tensor(2.0)))) == [
        0.3333,
        0.3333,
        0.2,
        0.1333,
    ]
    assert probabilities(prompt=(0,), repetition_penalty=2.0) == [
        0.3333,
        0.3333,
        0.2,
        0.1333,
    ]  # log 0.5 doubled: 0.25


def test_a_run_repeats_bit_for_bit(model: Path, tokens: ChatRenderer, tmp_path: Path) -> None:
    """Contract (b): batches depend on what is asked, not on when; also with more requests than fit
    one batch."""
    folders = {
        name: adapter_maker(model, tmp_path)(f"{name}-v1-0000", seed)
        for seed, name in enumerate(("first", "last"))
    }
    system = Chain([AgentSpec("first", prompt="first"), AgentSpec("last", prompt="last")])
    tasks = [Task(f"{a}{b}", f"{a}+{b}" * (a + 1), str(a + b)) for a in range(3) for b in range(4)]

    async def episodes() -> list[object]:
        engine = TransformersEngine(model, tokens=tokens, max_batch=8)
        try:
            team = await engine.publish(folders)
            speakers = {name: EngineCompleter(engine, tokens, name) for name in ("first", "last")}
            rollouts = EpisodeRunner(system, speakers, sampling=Sampling(max_tokens=8))
            played = [
                e
                async for e in rollouts.collect(
                    episode_requests(tasks, label="step-1", num_generations=2), TeamState(team)
                )
            ]
            return sorted((e.id, [(t.token_ids, t.logprobs) for t in e.turns]) for e in played)
        finally:
            await engine.close()

    once, again = asyncio.run(episodes()), asyncio.run(episodes())
    assert once == again and len(once) == 24


def test_requests_of_the_same_moment_share_a_batch(
    model: Path, tokens: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []
    plain = ContinuousBatch.advance
    monkeypatch.setattr(
        ContinuousBatch,
        "advance",
        lambda self, entering: (entered.append(len(entering)), plain(self, entering))[1],
    )
    prompt = tokens.prompt([Message("user", "7")])
    calls = [
        (prompt, ModelRef(BASE), Sampling(max_tokens=2, seed=seed), 2)
        for seed in (40, 10, 20, 30, 0)
    ]
    play(
        TransformersEngine(model, tokens=tokens, max_batch=4),
        *calls,
        (prompt, ModelRef(BASE), Sampling(max_tokens=3, seed=1)),
    )
    assert sum(entered) == 11 and entered[0] == 4 and max(entered) == 4


def test_scores_of_the_same_moment_are_those_of_each_alone(
    model: Path, tokens: ChatRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one adapter share a pass, up to a number of tokens; whoever goes away, and a row that
    is too long, take nobody with them."""
    folder = adapter_maker(model, tmp_path)("solver-v1-0000", 0)
    adapted, bare = ModelRef("solver", folder.name), ModelRef(BASE)
    rows = [tuple(range(1 + k, 1 + k + length)) for k, length in enumerate((9, 3, 30, 1))]
    passes: list[int] = []
    score = Sampler._score

    def count(sampler: Sampler, some: list[tuple[int, ...]]) -> list[list[float]]:
        passes.append(len(some))
        return score(sampler, some)

    monkeypatch.setattr(Sampler, "_score", count)

    async def work() -> None:
        engine = TransformersEngine(model, tokens=tokens)
        await engine.publish({"solver": folder})
        alone = {
            (row, ref): await engine.score(row, ref) for row in rows for ref in (adapted, bare)
        }
        assert passes == [1] * 8
        gone = asyncio.create_task(engine.score(rows[0], adapted))
        asked = [asyncio.create_task(engine.score(*key)) for key in alone]
        refused = asyncio.create_task(engine.score([1] * 600, adapted))
        await asyncio.sleep(0)
        gone.cancel()
        for (row, ref), scores in zip(alone, await asyncio.gather(*asked), strict=True):
            assert len(scores) == len(row) - 1
            assert scores == pytest.approx(alone[row, ref], abs=1e-5)
        assert passes[8:] == [5, 4]
        with pytest.raises(PromptTooLong):
            await refused
        monkeypatch.setattr("marlora.rollouts.engines.transformers_sampler.SCORED", 20)
        await asyncio.gather(*(engine.score(row, bare) for row in rows))
        assert passes[10:] == [2, 1, 1]
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await engine.score(rows[0], bare)

    asyncio.run(work())


def test_a_caller_that_goes_away_takes_nobody_with_it(model: Path, tokens: ChatRenderer) -> None:
    async def work() -> None:
        engine = TransformersEngine(model, tokens=tokens)
        prompt = tokens.prompt([Message("user", "7")])
        going = asyncio.create_task(
            engine.generate(prompt, ModelRef(BASE), Sampling(max_tokens=4, seed=1), 2)
        )
        staying = asyncio.create_task(
            engine.generate(prompt, ModelRef(BASE), Sampling(max_tokens=4, seed=2), 2)
        )
        await asyncio.sleep(0)
        going.cancel()
        assert len(await staying) == 2 and going.cancelled()
        await engine.close()

    asyncio.run(work())


def test_closing_fails_what_is_open(model: Path, tokens: ChatRenderer) -> None:
    async def work() -> None:
        engine = TransformersEngine(model, tokens=tokens, max_batch=1)
        prompt = tokens.prompt([Message("user", "7")])
        waiting = asyncio.create_task(
            engine.generate(prompt, ModelRef(BASE), Sampling(max_tokens=4, seed=1), 3)
        )
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed while requests were open"):
            await waiting

    asyncio.run(work())


def test_errors_name_bad_models_and_adapters(
    model: Path, tokens: ChatRenderer, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="nowhere"):
        TransformersEngine(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"empty.*cannot be loaded"):
        TransformersEngine(tmp_path / "empty", tokens=tokens)
    other = tiny_random_model(tmp_path / "wide", hidden_size=64)
    wrong = adapter_maker(other, tmp_path)("solver-v1-0000", 0)

    async def work() -> None:
        engine = TransformersEngine(model, tokens=tokens, max_adapters=1)
        with pytest.raises(EngineError, match="size mismatch"):
            await engine.publish({"solver": wrong})
        right = adapter_maker(model, tmp_path)("solver-v2.5-0000", 0)
        assert await engine.publish({"solver": right}) == {"solver": "solver-v2.5-0000"}
        with pytest.raises(EngineError, match="max_adapters=1"):
            await engine.publish({"solver": right})
        assert engine.info().replicas == ("local",) and engine.info().context == 512
        await engine.close()

    asyncio.run(work())


def test_bias_bends_what_is_drawn_and_a_grammar_is_refused(
    model: Path, tokens: ChatRenderer
) -> None:
    engine = TransformersEngine(model, tokens=tokens)
    biased = Sampling(max_tokens=4, seed=1, logit_bias={"40": 1000.0})
    asked = (tokens.prompt([Message("user", "hi")]), ModelRef(BASE, ""))
    (bent,), (plain,) = play(engine, (*asked, biased), (*asked, Sampling(max_tokens=4, seed=1)))
    assert (
        bent.token_ids == (40,) * 4
        and bent.logprobs == (0.0,) * 4
        and plain.token_ids != bent.token_ids
    )
    for sampling, problem in (
        (Sampling(grammar="{}"), "use engine: vllm"),
        (Sampling(logit_bias={"9999": 1.0}), "'9999' is no token"),
    ):
        with pytest.raises(SettingError, match=problem):
            play(TransformersEngine(model, tokens=tokens), (*asked, sampling))
