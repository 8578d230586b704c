"""What cannot work ends in one line that names the setting or the file, not in a traceback."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from marlora.agents.types import AdapterSpec, PolicySpec, Sampling, SettingError, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.types import Episode
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.testbeds.tiny import tiny_random_model

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64))


def mamba2() -> Mamba2ForCausalLM:
    config = Mamba2Config(num_heads=4, head_dim=8, state_size=8, n_groups=1, **SMALL)
    return Mamba2ForCausalLM(config)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, **SMALL
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "targets", "problem"),
    [
        (gpt2, ["all-linear"], "GPT2LMHeadModel has no torch.nn.Linear that a LoRA can stand on"),
        (gpt2, ["c_attn"], "GPT2LMHeadModel has no torch.nn.Linear"),
        (mamba2, ["out_proj"], "'out_proj' is not a linear layer of Mamba2ForCausalLM to stand on"),
        (mamba2, ["q_proj"], "its linear layers: in_proj"),
        (mamba2, ["all-linear", "in_proj"], "'all-linear' names every linear layer; give it alone"),
        (llama, ["all-linear", "q_proj"], "'all-linear' names every linear layer; give it alone"),
        (llama, ["q_proj", "all-linear"], "'all-linear' names every linear layer; give it alone"),
        (llama, ["all-linear", "all-linear"], "give it alone"),
    ],
)
def test_targets_that_cannot_be(make, targets: list[str], problem: str) -> None:
    policy = PolicySpec("x", adapter=AdapterSpec(r=2, targets=tuple(targets)))
    with pytest.raises(SettingError) as raised:
        Adapters(make(), [policy], seed=0)
    assert str(raised.value).startswith("policies.x.adapter.targets: ")
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_all_linear_of_a_model_of_states_leaves_out_what_peft_refuses() -> None:
    policy = PolicySpec("x", adapter=AdapterSpec(r=2, targets=("all-linear",)))
    names = Adapters(mamba2(), [policy], seed=0).parameters("x")
    assert names and all(".in_proj." in name for name in names)


@pytest.mark.parametrize("value", [1e200, -1e200, 1e16, math.inf, math.nan])
def test_a_reward_beyond_what_losses_hold_leaves_its_episode_unscorable(value: float) -> None:
    def huge(task: Task, episode: Episode) -> float:
        return value

    task = Task("t", "?")
    (reward,) = asyncio.run(score(task, Episode("e", "g", task, output=""), [huge]))
    assert math.isnan(reward.value) and f"reward 'huge' gave {value}" in reward.text
    assert ("expected at most 1e+15" in reward.text) == math.isfinite(value)


def test_a_token_beyond_the_embedding_names_model_and_token(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    engine = TransformersEngine(str(model))
    (ids,) = engine.tokens.tokenizer(["z"], add_special_tokens=False)["input_ids"]
    try:
        engine._vocabulary = max(ids)  # as if the weights were of a model with fewer tokens
        for call in (
            lambda: engine.generate(ids, ModelRef("base"), Sampling(max_tokens=1)),
            lambda: engine.score(ids, ModelRef("base")),
        ):
            with pytest.raises(SettingError) as raised:
                asyncio.run(call())
            told = str(raised.value)
            assert str(model) in told and f"{engine.tokens.show([max(ids)])!r}" in told
            assert f"id {max(ids)}" in told and f"{max(ids)} rows" in told
    finally:
        asyncio.run(engine.close())
