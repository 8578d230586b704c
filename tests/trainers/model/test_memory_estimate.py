"""The memory estimate against counts by hand and against what a real backward pass keeps, and the
split of a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.rollouts.engines import factory
from marlora.trainers.batching.batches import Batch, pack
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.config import RunConfig
from marlora.trainers.model import memory_estimate
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.layouts import choose_layout
from marlora.trainers.model.logprobs import last_hidden
from marlora.trainers.model.memory_estimate import (
    GIB,
    Memory,
    TrainerPlacement,
    engine_estimate,
    estimate,
    needs_checkpointing,
    server_share,
    trainer_room,
    with_server_memory,
)
from marlora.trainers.testbeds.tiny import tiny_random_model

SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
)
SPECS = [
    PolicySpec(name, adapter=AdapterSpec(8, 16.0, ("q_proj", "v_proj"))) for name in ("a", "b")
]


def folder_of(config: Any, folder: Path) -> Path:
    """A model folder of this geometry; estimates read no weights, so it holds none."""
    made = tiny_random_model(folder)
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": [type(config).__name__]})
    )
    return made


def replies(prompt: int, own: int, count: int) -> list[TrainingSequence]:
    """So many sequences with a prompt in common; own tokens differ from the first on, and the last
    one is trained."""
    made = []
    for g in range(count):
        ids = (*(i % 400 for i in range(prompt)), *((g + i + 1) % 400 for i in range(own)))
        mask = (0,) * (len(ids) - 1) + (1,)
        zeros = (0.0,) * len(ids)
        made.append(
            TrainingSequence(
                "a", str(g), ids, mask, zeros, zeros, (1.0,) * len(ids), tuple(m - 1 for m in mask)
            )
        )
    return made


def kept_by(config: Any, batch: Batch, dtype: torch.dtype, recompute: bool = False) -> int:
    """Bytes that autograd keeps of a batch's rows in a real model on the CPU, its adapter `a`
    active."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapters = Adapters(model, SPECS, seed=0)
    assert choose_layout(adapters.model) == "shared"
    if recompute:
        adapters.checkpoint_activations()
    own = {
        t.untyped_storage()._cdata
        for t in (*adapters.model.parameters(), *adapters.model.buffers())
    }
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        adapters.active("a"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        last_hidden(adapters.model, batch, batch.row, batch.column)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_activations_are_those_of_a_real_backward_within_15_percent(
    tmp_path: Path, kind: Any, dtype: torch.dtype
) -> None:
    config = kind(**SHAPE, head_dim=16)
    (batch,) = pack([replies(513, 0, 1)[0]], max_tokens=512, layout="padded")
    settings = RunConfig(tokens_per_batch=512, layout="padded")
    found = estimate(str(folder_of(config, tmp_path)), SPECS, settings, dtype)
    assert found.activations == pytest.approx(kept_by(config, batch, dtype), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt, own, count", [(384, 48, 8), (90, 8, 32), (0, 100, 5)])
def test_trees_keep_a_prefix_for_every_branch(
    tmp_path: Path, prompt: int, own: int, count: int, dtype: torch.dtype
) -> None:
    config = LlamaConfig(**SHAPE, head_dim=16)
    (batch,) = pack(replies(prompt, own, count), max_tokens=10_000)
    tokens = batch.input_ids.numel()
    settings = RunConfig(tokens_per_batch=tokens)
    keys = len(batch.tree.keys.index) / tokens
    found = estimate(
        str(folder_of(config, tmp_path)), SPECS, settings, dtype, keys_per_token=keys, on_cpu=True
    )
    assert found.activations == pytest.approx(kept_by(config, batch, dtype), rel=0.15)


def test_recomputing_keeps_the_inputs_of_layers(tmp_path: Path) -> None:
    """What autograd holds between the passes: the estimate adds one layer, which the backward pass
    has at a time."""
    config = LlamaConfig(**SHAPE, head_dim=16)
    (batch,) = pack(replies(384, 48, 8), max_tokens=10_000)
    tokens = batch.input_ids.numel()
    settings, path = RunConfig(tokens_per_batch=tokens), str(folder_of(config, tmp_path))
    plain, lean = (
        estimate(path, SPECS, settings, torch.float32, recompute=r, keys_per_token=1).activations
        for r in (False, True)
    )
    assert lean - plain / 3 == pytest.approx(
        kept_by(config, batch, torch.float32, recompute=True), rel=0.15
    )


def test_parameters_are_counted(tmp_path: Path) -> None:
    path = str(folder_of(LlamaConfig(**SHAPE, tie_word_embeddings=True), tmp_path))
    found = estimate(
        path,
        [*SPECS, PolicySpec("base"), PolicySpec("out", url="http://x/v1")],
        RunConfig(),
        torch.bfloat16,
    )
    layer = (
        64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64
    )  # q and o, k and v, gate, up and down, two norms
    assert found.parameters == 400 * 64 + 3 * layer + 64
    assert found.adapter_parameters == 2 * 3 * 8 * (
        (64 + 64) + (64 + 32)
    )  # two policies, three layers: q_proj and v_proj
    assert (found.weights, found.adapters) == (2 * found.parameters, 16 * found.adapter_parameters)
    assert found.head == 4 * 4 * 8192 * 400, "a whole batch at a time"
    assert (
        estimate(path, SPECS, RunConfig(tokens_per_batch=50_000), torch.bfloat16, on_cpu=True).head
        == 4 * 4 * (24 * 2**20 // 4 // 400) * 400
    )
    assert found.total == found.weights + found.adapters + found.activations + found.head


def test_checkpointing_keeps_one_input_per_layer_and_one_layer(tmp_path: Path) -> None:
    path = str(folder_of(LlamaConfig(**SHAPE), tmp_path))
    plain = estimate(path, SPECS, RunConfig(tokens_per_batch=100, layout="padded"), torch.float32)
    lean = estimate(
        path, SPECS, RunConfig(tokens_per_batch=100, layout="padded"), torch.float32, recompute=True
    )
    assert lean.activations == pytest.approx(100 * 4 * 64 * 4 + plain.activations / 3)


def test_a_base_that_is_served_only_takes_nothing_of_the_trainer(tmp_path: Path) -> None:
    path = str(folder_of(LlamaConfig(**SHAPE, tie_word_embeddings=True), tmp_path))
    trained = estimate(path, SPECS, RunConfig(), torch.bfloat16)
    served = engine_estimate(path, SPECS, torch.bfloat16)
    assert (served.parameters, served.adapter_parameters, served.weights) == (
        trained.parameters,
        trained.adapter_parameters,
        trained.weights,
    )
    assert served.total == 0.0 < trained.total

    device = torch.device("cpu")
    config = RunConfig(dtype="bfloat16")
    mixed = {path: SPECS}
    assert TrainerPlacement(config, mixed, device).memory()[path].held
    frozen = TrainerPlacement(config, mixed, device, served_only=frozenset({path}))
    assert not frozen.memory()[path].held and not frozen.trains
    assert not needs_checkpointing(frozen, lambda text: pytest.fail(text))
    assert not TrainerPlacement(config, {}, device).trains


def need(gib: float) -> Memory:
    return Memory(1, 1, weights=gib * GIB, adapters=0.0, activations=0.0, head=0.0)


def test_servers_divide_what_the_trainers_leave() -> None:
    said: list[str] = []
    assert server_share([need(10)], 80 * GIB, said.append) == pytest.approx(1 - 16.5 / 80)
    assert "trainer about 16.5 GiB of the GPU's 80" in said[0] and "vLLM takes 79%" in said[0]
    assert server_share([need(1), need(1)], 80 * GIB, said.append) == pytest.approx(
        (1 - 4.5 / 80) / 2
    )
    assert server_share([need(0.1)], 80 * GIB, said.append) == 0.9, "some of it is the driver's"
    with pytest.raises(
        SettingError, match=r"server_memory: .*needs at least 60% and gets 19%; .*server_devices"
    ):
        server_share([need(12)], 24 * GIB, said.append)


def test_only_a_shared_gpu_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(
        memory_estimate,
        "estimate",
        lambda path, specs, config, dtype, ranks=1, recompute=False, on_cpu=False: need(10),
    )
    monkeypatch.setattr(factory.importlib.util, "find_spec", lambda name: name)

    def memory_of(device: str, **settings: Any) -> float:
        config = RunConfig(dtype="bfloat16", **settings)
        placement = TrainerPlacement(config, {"m": SPECS}, torch.device(device))
        return with_server_memory(placement, lambda text: None).server_memory

    assert memory_of("cuda") == pytest.approx(1 - 16.5 / 80)
    assert memory_of("cuda", server_memory=0.3) == 0.3
    assert (
        memory_of("cpu")
        == memory_of("cuda", engine="transformers")
        == memory_of("cuda", server_devices="1")
        == 0
    )
    assert memory_of("cuda", server_urls=["http://host/v1"]) == 0

    def alone(*bases: str) -> float:
        """All bases are served only: one has the GPU as vLLM takes it, more divide it."""
        config = RunConfig(dtype="bfloat16")
        monkeypatch.setattr(
            memory_estimate, "engine_estimate", lambda *args: replace(need(10), held=False)
        )
        placement = TrainerPlacement(
            config, dict.fromkeys(bases, SPECS), torch.device("cuda"), served_only=frozenset(bases)
        )
        return with_server_memory(placement, lambda text: None).server_memory

    assert alone("m") == 0
    assert alone("m", "n") == pytest.approx((1 - 1.5 / 80) / 2)


def test_checkpointing_is_on_only_where_the_trainer_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = str(folder_of(LlamaConfig(**SHAPE), tmp_path)), []

    def chosen(setting: Any, gib: float, device: str = "cpu") -> bool:
        monkeypatch.setattr(
            memory_estimate, "trainer_room", lambda config, needs, device: gib * GIB
        )
        config = RunConfig(gradient_checkpointing=setting, dtype="float32")
        placement = TrainerPlacement(config, {path: SPECS}, torch.device(device))
        return needs_checkpointing(placement, said.append)

    need = estimate(path, SPECS, RunConfig(), torch.float32).total / GIB
    assert [chosen("auto", need + 0.01), chosen("auto", need - 0.01)] == [False, True]
    assert said == [
        f"memory: the trainer would need about {need:.1f} GiB and has {need - 0.01:.1f}: gradient"
        " checkpointing is on"
    ]
    assert [chosen(True, 100), chosen("true", 100), chosen(False, 0), chosen("false", 0)] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(
        SettingError, match="gradient_checkpointing: expected one of auto, true, false, got 'yes'"
    ):
        RunConfig(gradient_checkpointing="yes")


def test_the_room_is_what_servers_and_other_processes_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Card:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(factory.importlib.util, "find_spec", lambda name: name)

    def room(device: str, **settings: Any) -> float:
        return trainer_room(RunConfig(**settings), [need(8)], torch.device(device)) / GIB

    assert (
        room("cuda", engine="transformers")
        == room("cuda", server_devices="1")
        == pytest.approx((80 - 1.5) / 1.5)
    )
    assert room("cuda", server_memory=0.5) == pytest.approx((40 - 1.5) / 1.5)
    assert room("cuda") == pytest.approx((80 - 8 - 8 - 1.5) / 1.5), (
        "the server needs its weights and a tenth of the GPU"
    )
    monkeypatch.setattr(memory_estimate, "machine_bytes", lambda: 16 * GIB)
    assert room("cpu") == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room("cpu") == 2
    monkeypatch.undo()
    assert GIB / 4 < memory_estimate.machine_bytes() < 2**50
