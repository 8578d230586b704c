"""What needs an NVIDIA GPU, in a minute and without a server: `make test-gpu`. The parts of `marlora
bench gpu` that serve try the same with vLLM.

Each test asks for the fixture `device`; `MARLORA_TEST_DEVICE=cpu` runs what a CPU can do of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import AdapterSpec, PolicySpec
from marlora.recipes import grpo_team
from marlora.trainers.batching.batches import pack
from marlora.trainers.bench.geometry import LORA, network
from marlora.trainers.bench.gpu.work import peak_flops
from marlora.trainers.bench.update import POLICY, Case, disturb, gradient, recorded, with_logprobs
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.fused_lm_head import find_fused_head, fused_head
from marlora.trainers.model.layouts import choose_layout, forced, way_of
from marlora.trainers.model.lm_head import score
from marlora.trainers.update.losses.policy_gradient import policy_loss
from marlora.trainers.update.optimizer_step import Optimizers, update

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative norm of two gradients' difference


@pytest.fixture
def device() -> torch.device:
    chosen = torch.device(os.environ.get("MARLORA_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.fail("no NVIDIA GPU is seen here: these tests run on one only")
    return chosen


def prepared(device: torch.device, dtype: torch.dtype) -> tuple[Adapters, list[Any]]:
    """A tiny model with a trained adapter, and twenty replies to one prompt."""
    spec = PolicySpec(POLICY, adapter=LORA)
    adapters = Adapters(network("tiny", str(device), dtype), [spec], seed=0)
    disturb(adapters, seed=1)
    return adapters, with_logprobs(adapters, recorded(Case(20, 24, 6)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["branches", "flex"])
def test_gradients_through_trees_are_those_of_padded_rows(
    device: torch.device, dtype: torch.dtype, way: Any
) -> None:
    adapters, samples = prepared(device, dtype)
    grads = []
    for layout, forced_way in (("padded", "branches"), ("shared", way)):
        rows = [b.to(device) for b in pack(samples, max_tokens=8192, layout=layout)]
        with forced(adapters.model, forced_way):
            grads.append(gradient(adapters, rows, samples))
    assert (grads[0] - grads[1]).norm() <= NEAR[dtype] * grads[0].norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_takes_flex_attention(device: torch.device, dtype: torch.dtype) -> None:
    adapters, _ = prepared(device, dtype)
    assert choose_layout(adapters.model) == "shared"
    assert way_of(adapters.model) == ("flex" if device.type == "cuda" else "branches")


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_head_of_trl_is_taken_and_scores_as_ours(
    device: torch.device, dtype: torch.dtype, cap: float | None
) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False).to(device, dtype).requires_grad_(False)
    hidden = torch.randn(300, 64).to(device, dtype)
    target = torch.arange(300, device=device)
    temperature = torch.full((300,), 0.7, device=device)
    temperature[100:] = 1.0
    if device.type == "cuda":
        assert find_fused_head()[0] is not None and fused_head(device) is not None
    found = []
    for fuse in (True, False):
        leaf = hidden.clone().requires_grad_()
        logp, entropy = score(head, cap, leaf, target, temperature, entropy_grad=True, fuse=fuse)
        (logp.sum() + 0.1 * entropy.sum()).backward()
        assert leaf.grad is not None
        found.append((logp.detach(), entropy.detach(), leaf.grad.float()))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs - ours).norm() <= NEAR[dtype] * ours.norm()


def test_one_adapter_learns_and_nothing_else_moves(device: torch.device) -> None:
    policies = [PolicySpec(name, adapter=AdapterSpec(r=4, alpha=8.0)) for name in ("a", "b")]
    adapters = Adapters(network("tiny", str(device), torch.bfloat16), policies, seed=0)
    before = adapters.base_sha256(), adapters.sha256("a"), adapters.sha256("b")
    ranks, config = Ranks(), GRPOConfig()
    ranks.device = device
    samples = recorded(Case(4, 8, 4), policy="a")
    result = update(
        Optimizers(adapters, config), samples, lambda x: policy_loss(x, config), 1, ranks
    )
    assert result["a"].applied and result["a"].grad_norm > 0
    after = adapters.base_sha256(), adapters.sha256("a"), adapters.sha256("b")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_a_run_of_the_tiny_team_proves_its_adapters(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, learnt, published and proven on the same GPU."""
    argv = "--engine transformers --max_steps 2 --num_eval_tasks 4 --tasks_per_step 2"
    command = ["grpo_team", *argv.split(), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    grpo_team.main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["live_proof"]["passed"] >= 2 and summary["live_proof"]["failed"] == 0
    assert all(p["sha256_before"] != p["sha256_after"] for p in summary["policies"].values())


def test_the_data_sheet_knows_this_gpu(device: torch.device) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "NVIDIA H200"
    peak = peak_flops(name)
    assert peak is None or peak > 1e14
