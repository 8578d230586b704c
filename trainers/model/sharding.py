"""Sharding of a base that does not fit one device: the frozen weights of its layers are split over
the ranks, by FSDP2 or DeepSpeed's ZeRO-3.

Each rank keeps its share of every decoder layer and gathers a layer (ZeRO-3: a linear map) when a
pass comes to it. Adapters, embeddings, the last norm and the output head stay whole on every rank:
adapters are what is learnt, so they are summed directly as without sharding, and the rest is small
beside the layers. Because gathering is collective, every rank has to make the same passes in the
same order: `Ranks.lockstep` (ranks get the same number of batches, see `batches.pad_ranks`, and
what rank 0 computes for itself the others join).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import nn

from ...agents.types import SettingError
from ..distributed.ranks import Ranks
from .adapters import Adapters


def sharding_mode(setting: bool, environ: Mapping[str, str] = os.environ) -> str:
    """The implementation that splits the base, "fsdp2" or "deepspeed"; "": none.

    It is where `shard_base` says so (FSDP2), or `accelerate launch` was given such a configuration.
    Raises `SettingError` for what of accelerate's we cannot do: other stages of ZeRO, FSDP's first
    version, weights offloaded to the CPU.
    """

    def on(name: str) -> bool:
        return environ.get(name, "").lower() in ("1", "true")

    if on("ACCELERATE_USE_DEEPSPEED"):
        instead = "use --config_file recipes/accelerate/deepspeed_zero3.yaml"
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
            raise SettingError(
                "accelerate: deepspeed_config_file is not read, DeepSpeed only splits the base;"
                f" {instead}"
            )
        stage, offload = (
            environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
            environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
        )
        if stage != "3":
            raise SettingError(
                f"accelerate: zero_stage {stage}, 3 expected: the base's weights are all there is"
                f" to split; {instead}"
            )
        if offload not in (None, "none"):
            raise SettingError(
                f"accelerate: offload_param_device {offload} is not supported; set it to none and"
                " use more ranks"
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise SettingError(
                "accelerate: DeepSpeed is not installed: pip install marlora[deepspeed], or"
                " recipes/accelerate/fsdp2.yaml"
            )
        return "deepspeed"
    if not on("ACCELERATE_USE_FSDP"):
        return "fsdp2" if setting else ""
    instead = "use --config_file recipes/accelerate/fsdp2.yaml, or shard_base"
    if environ.get("FSDP_VERSION", "1") != "2":
        raise SettingError(
            f"accelerate: FSDP version {environ.get('FSDP_VERSION', '1')}, 2 expected; {instead}"
        )
    if on("FSDP_OFFLOAD_PARAMS"):
        raise SettingError(
            "accelerate: fsdp_offload_params is not supported; set it to false and use more ranks"
        )
    return "fsdp2"


def split(adapters: Adapters, ranks: Ranks) -> None:
    """Split the layers of a base that lies in the CPU's memory over the ranks; everything else goes
    whole to this rank's device.

    To be called once all policies have their adapters and before any optimizer is made. Each layer
    passes through the device by itself, so the whole base is never there. Raises `SettingError`
    with one process, or if the model has no list of layers.
    """
    if ranks.size == 1:
        raise SettingError(
            "shard_base: expected several processes to share the base, got one; start more "
            "(accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes N)"
        )
    decoder = adapters.model.get_base_model().get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SettingError(
            f"shard_base: {type(decoder).__name__} has no list of layers to split; set shard_base"
            " to false"
        )
    _ = adapters.loaded_sha256  # while it is whole, for rank 0 will ask for it alone
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {
        p
        for name, p in adapters.model.named_parameters()
        if ".lora_" in name or id(p) not in inside
    }
    if sharding_mode(True) == "deepspeed":
        same_targets(adapters)
        _by_deepspeed(decoder, whole, ranks)
    else:
        _by_fsdp2(decoder, layers, whole, ranks)
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    for module in adapters.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(ranks.device))
    adapters.refresh()
    ranks.lockstep = True


def same_targets(adapters: Adapters) -> None:
    """Raise `SettingError` if adapters stand on different linear maps: ranks could then need
    different weights in a backward pass, and hang."""
    targets_of = {
        name: sorted(adapters.model.peft_config[name].target_modules) for name in adapters.policies
    }
    first = next(iter(targets_of), "")
    for name, targets in targets_of.items():
        if targets != targets_of[first]:
            raise SettingError(
                f"accelerate: DeepSpeed wants all adapters on the same linear maps, policy {name!r}"
                f" has {targets} and {first!r} {targets_of[first]}; set"
                f" policies.{name}.adapter.targets, or use --config_file"
                " recipes/accelerate/fsdp2.yaml"
            )


def _by_fsdp2(
    decoder: nn.Module, layers: nn.ModuleList, whole: set[nn.Parameter], ranks: Ranks
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(
        decoder, mesh=mesh, ignored_params=whole
    )  # holds nothing itself; lets it fetch the next layer ahead


def _by_deepspeed(decoder: nn.Module, whole: set[nn.Parameter], ranks: Ranks) -> None:
    """ZeRO-3 of parameters alone: its hooks gather and release, it gets no optimizer, and what
    stays whole is hidden from it."""
    cpu = ranks.device.type == "cpu"
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # on a machine with GPUs too
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    # else it compiles an all-reduce through shared memory: more than a minute, and once killed it
    # locks out all later ones
    if cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    hidden = [
        (module, name, child)
        for module in list(decoder.modules())
        for name, child in module.named_children()
        if whole.issuperset(child.parameters())
    ]
    for module, name, _ in hidden:
        module._modules[name] = None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    try:
        DeepSpeedZeRoOffload(
            decoder,
            timers=None,
            ds_config=config,
            param_persistence_threshold=0,
            overlap_comm=False,
        )
    finally:
        for module, name, child in hidden:
            module._modules[name] = child
