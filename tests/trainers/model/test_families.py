"""Families of every kind against their own eager attention, row by row: layouts, attention that
SDPA drops, dropout under gradient checkpointing, experts, and frequencies that follow the batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from marlora.agents.types import AdapterSpec, PolicySpec, Sampling, SettingError
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.transformers_exactness import (
    fix_rotary,
    padding_is_exact,
    use_exact_attention,
)
from marlora.rollouts.engines.transformers_sampler import Sampler, SampleRequest
from marlora.trainers.batching.batches import Layout, pack
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.config import RunConfig
from marlora.trainers.model import memory_estimate
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.layouts import choose_layout, chosen_layout
from marlora.trainers.model.logprobs import token_logprobs
from marlora.trainers.weight_sync.probes import ScoredWindow, trainer_logprobs
from tests.trainers.random_models import SIZES, disturb, random_model

MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "lfm2": {"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "bamba": {**MAMBA, "attn_layer_indices": [0]},
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["attention", "mamba"]},
    "recurrent_gemma": {
        "block_types": ["attention", "recurrent"],
        "attention_window_size": 64,
        "lru_width": 16,
    },
    "llama4_text": {**EXPERTS, "attention_chunk_size": 8, "intermediate_size_mlp": 24},
}
MOE: dict[str, dict[str, Any]] = {
    name: EXPERTS
    for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "glm4_moe")
} | {
    "deepseek_v2": {**EXPERTS, **LATENT},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
}
DROPPING: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.3, "attention_dropout": 0.2},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.2},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.2},
    "phimoe": {**EXPERTS, "attention_dropout": 0.2},
}
LONG = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}


def crowd() -> list[TrainingSequence]:
    """Rows with a common prompt, with part of it, with a prompt of one token, and a long one."""
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 41, (count,), generator=draw).tolist()

    prompt = ids(9)
    rows = [(prompt, ids(5)), (prompt, ids(3)), (ids(1), ids(6)), (prompt[:5], ids(9))]
    rows += [(ids(2), ids(22)), (ids(1), ids(3))]
    return [one(before + after, len(before), str(n)) for n, (before, after) in enumerate(rows)]


def one(ids: list[int], first: int, episode: str) -> TrainingSequence:
    mask = tuple(int(i >= first) for i in range(len(ids)))
    zeros = (0.0,) * len(ids)
    ones = (1.0,) * len(ids)
    turns = tuple(m - 1 for m in mask)
    return TrainingSequence("a", episode, tuple(ids), mask, zeros, ones, ones, turns)


def adapted(family: str, **settings: Any) -> Adapters:
    policy = PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("all-linear",)))
    adapters = Adapters(random_model(family, **settings), [policy], seed=0)
    disturb(adapters)
    return adapters


def gradient(adapters: Adapters) -> torch.Tensor:
    found = []
    for parameter in adapters.parameters("a").values():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.flatten().clone())
        parameter.grad = None
    return torch.cat(found)


def right(adapters: Adapters, samples: list[TrainingSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and gradients of plain rows, one by one, under eager attention."""
    base, values = adapters.model.get_base_model(), []
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with adapters.active("a") as model:
        for sample in samples:
            ids = torch.tensor([sample.ids])
            logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            chosen = logps.gather(1, ids[0, 1:, None])[:, 0]
            chosen = chosen[torch.tensor(sample.mask[1:]).bool()]
            chosen.sum().backward()
            values.append(chosen.detach())
    base.set_attn_implementation(before)
    return torch.cat(values), gradient(adapters)


def by(adapters: Adapters, samples: list[TrainingSequence], layout: Layout) -> Any:
    values = torch.zeros(sum(sample.num_trained for sample in samples))
    with adapters.active("a") as model:
        for batch in pack(samples, max_tokens=1000, layout=layout):
            logps = token_logprobs(model, batch)[0]
            logps.sum().backward()
            values[batch.token_index] = logps.detach()
    return values, gradient(adapters)


def agree(found: Any, expected: Any) -> None:
    assert (found[0] - expected[0]).abs().max() < 3e-5
    assert (found[1] - expected[1]).norm() < 3e-5 * expected[1].norm()


@pytest.mark.parametrize("family", [*HYBRIDS, *MOE, "gemma2", "stablelm"])
def test_every_layout_that_is_chosen_is_exact(family: str) -> None:
    adapters, samples = adapted(family, **(HYBRIDS | MOE).get(family, {})), crowd()
    expected = right(adapters, samples)
    for setting in ("padded", "auto"):
        agree(by(adapters, samples, choose_layout(adapters.model, setting)), expected)
    if family in HYBRIDS:
        with pytest.raises(SettingError, match="layout: shared rows cannot be used"):
            choose_layout(adapters.model, "shared")
    elif family != "stablelm":
        assert choose_layout(adapters.model) == "shared"


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "bamba", "recurrent_gemma"])
def test_half_precision_shares_and_packs_nothing_that_it_cannot_show(family: str) -> None:
    model = random_model(family, **HYBRIDS[family]).to(torch.bfloat16)
    assert choose_layout(model) == "padded"


def test_the_proof_lays_rows_out_as_the_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, seen = adapted("llama"), []
    monkeypatch.setattr(
        "marlora.trainers.weight_sync.probes.pack",
        lambda samples, **how: seen.append(how["layout"]) or pack(samples, **how),
    )
    for setting in ("padded", "packed", "auto"):
        layout = choose_layout(adapters.model, setting)
        trainer_logprobs(adapters, [ScoredWindow((2, 3, 4)), ScoredWindow((5, 6, 7))], "a")
        assert chosen_layout(adapters.model) == layout == seen[-1]
    assert seen == ["padded", "packed", "shared"]


@pytest.mark.parametrize("family", ["gemma2", "llama", "gemma3_text", "recurrent_gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_attends_as_the_model_itself(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, **HYBRIDS.get(family, {})).to(dtype)
    assert bool(use_exact_attention(model)) == (family == "gemma2")
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    assert padding_is_exact(model) == (family != "recurrent_gemma")
    assert not use_exact_attention(model), "asked twice, it has nothing to change"


@pytest.mark.parametrize("family", DROPPING)
def test_nothing_is_dropped_where_activations_are_recomputed(family: str) -> None:
    adapters, samples = adapted(family, **DROPPING[family]), crowd()
    expected = right(adapters, samples)
    layout = choose_layout(adapters.model, "padded")
    adapters.checkpoint_activations()
    for _ in range(2):
        agree(by(adapters, samples, layout), expected)
    assert adapters.recomputes
    assert any(module.training for module in adapters.model.modules()), "else nothing recomputes"


def test_dropout_that_cannot_be_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted("llama")
    layer = adapters.model.get_base_model().model.layers[0]
    run = type(layer).forward

    def forward(self: Any, hidden: torch.Tensor, **more: Any) -> Any:
        out = run(self, hidden, **more)
        return torch.nn.functional.dropout(out, 0.2, training=self.training)

    monkeypatch.setattr(type(layer), "forward", forward)
    with pytest.raises(SettingError, match="gradient_checkpointing: passes of LlamaForCausalLM"):
        adapters.checkpoint_activations()


@pytest.mark.parametrize("family", MOE)
def test_adapters_of_models_with_experts_are_plain_peft(family: str, tmp_path: Path) -> None:
    adapters = adapted(family, **MOE[family])
    folder = adapters.save("a", tmp_path / "a")
    fresh = random_model(family, **MOE[family])
    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    ids = torch.tensor([crowd()[0].ids])
    with torch.no_grad(), adapters.active("a") as model:
        assert torch.allclose(model(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-5)
    adapters.load("a", folder)


def test_a_name_that_peft_takes_for_experts_is_refused() -> None:
    policy = PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("down_proj",)))
    with pytest.raises(SettingError, match=r"policies\.a\.adapter\.targets: 'down_proj'"):
        Adapters(random_model("glm4_moe", **MOE["glm4_moe"]), [policy], seed=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "bloom"])
def test_an_estimate_that_fails_is_a_warning(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoConfig.for_model(family, **(SIZES | MOE.get(family, {})))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    monkeypatch.setattr(memory_estimate, "base_on_meta", lambda model, dtype: network)
    policy = PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("all-linear",)))
    settings = RunConfig(model="m", tokens_per_batch=1000)
    memory = memory_estimate.estimate("m", [policy], settings, torch.float32)
    assert "cannot be measured" in caplog.text and "gradient_checkpointing" in caplog.text
    assert memory.activations > 1000 * 4 * 2 * 16 * 4, "at least what attention's maps take"


def rotary(kind: str) -> dict[str, Any]:
    if kind == "dynamic":
        more = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        return {"max_position_embeddings": 16, "rope_parameters": more}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    more = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0} | factors
    more["original_max_position_embeddings"] = 16
    return {**LONG, "rope_parameters": more}


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "longrope"), ("llama", "dynamic"), ("phi3", "longrope")]
)
def test_a_log_prob_does_not_depend_on_what_shares_its_batch(family: str, kind: str) -> None:
    model = random_model(family, **rotary(kind))
    policy = PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("all-linear",)))
    adapters, samples = Adapters(model, [policy], seed=0), crowd()
    disturb(adapters)
    short, long = samples[0], samples[4]
    assert len(short.ids) <= 16 < len(long.ids)
    alone = by(adapters, [short], "padded")[0]
    expected = right(adapters, samples)
    assert torch.allclose(expected[0][: len(alone)], alone, atol=1e-5)
    for setting in ("padded", "auto"):
        agree(by(adapters, samples, choose_layout(adapters.model, setting)), expected)
    assert torch.allclose(by(adapters, [short], "padded")[0], alone, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "falcon_h1", "lfm2", "longrope", "dynamic"])
def test_sampled_log_probs_are_those_of_the_plain_row(family: str) -> None:
    """Replies that share a batch, cross the original context, and were cached, against the row."""
    if family in ("longrope", "dynamic"):
        model = random_model("llama", **rotary(family))
        fix_rotary(model)
    else:
        model = random_model(family, **HYBRIDS.get(family, {}))
        use_exact_attention(model)
    sampler = Sampler(model, SimpleNamespace(eos_ids=(), decode=str), "cpu")
    sampling = Sampling(temperature=1.0, max_tokens=9)
    prompts = [sample.ids[:11] for sample in crowd()[:4]]
    if not sampler.pads:
        prompts = [ids for ids in prompts if len(ids) == 11]
    requests = [
        SampleRequest(ids, ModelRef("a"), sampling, seed) for seed, ids in enumerate(prompts)
    ]
    sampler.decode(requests)
    assert len({len(request.ids) for request in requests}) == (2 if sampler.pads else 1)
    model.set_attn_implementation("eager")
    for request in requests:
        row = (*request.ids, *request.token_ids)
        (scored,) = sampler.score([row], ModelRef("a"))
        scores = scored[len(request.ids) - 1 :]
        assert request.logprobs == pytest.approx(scores, abs=2e-5) and len(scores) == 9


def test_factors_follow_the_context_of_the_run_as_vllm_has_it() -> None:
    """longrope: short factors up to the original context, long ones beyond; dynamic: unscaled."""
    ids = torch.tensor([crowd()[0].ids])
    plain = random_model("llama", max_position_embeddings=64)
    short, long = (random_model("llama", **rotary("longrope")) for _ in range(2))
    assert fix_rotary(short, 16) == 16 and fix_rotary(long) == 64 and not fix_rotary(long)
    scaling = short.model.rotary_emb.attention_scaling
    angles = [1.0 / 10000 ** (k / 4) for k in range(4)]
    assert short.model.rotary_emb.inv_freq.tolist() == pytest.approx(angles)
    divided = [a / f for a, f in zip(angles, [2.0, 3.0, 4.0, 5.0], strict=True)]
    assert long.model.rotary_emb.inv_freq.tolist() == pytest.approx(divided)
    assert long.model.rotary_emb.attention_scaling == scaling > 1
    dynamic = random_model("llama", **rotary("dynamic"))
    assert fix_rotary(dynamic) == 16
    with torch.no_grad():
        assert torch.equal(dynamic(input_ids=ids).logits, plain(input_ids=ids).logits)
