"""
A base that does not fit one device: the frozen weights of its layers are split over the ranks (FSDP2).

Each rank keeps its share of every decoder layer and gathers a layer when a pass comes to it. Adapters, embeddings, the last norm and the
output head stay whole on every rank: adapters are what is learnt, so they are summed directly as without sharding, and the rest is
small beside the layers. Because gathering is collective, every rank has to make the same passes in the same order: `Ranks.lockstep`
(batches are levelled, see `batches.level`, and what rank 0 computes alone it asks the others to join, see `Ranks.together`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..agents.types import SettingError, from_json, to_json
from .adapters import Adapters
from .publish import Probe, trainer_logprobs
from .ranks import Ranks

if TYPE_CHECKING:
    from .run import Run

PROBE = "the trainer's log-probs of a proof"


def wanted(setting: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Is the base to be split: by `shard_base`, or because `accelerate launch` was given an FSDP configuration?

    Raises `SettingError` for what of accelerate's we cannot do: DeepSpeed, FSDP's first version, weights offloaded to the CPU.
    """

    def on(name: str) -> bool:
        return environ.get(name, "").lower() in ("1", "true")

    instead = "use --config_file recipes/accelerate/fsdp2.yaml, or shard_base"
    if on("ACCELERATE_USE_DEEPSPEED"):
        raise SettingError(f"accelerate: DeepSpeed is not supported, adapters are trained without its engine; {instead}")
    if not on("ACCELERATE_USE_FSDP"):
        return setting
    if environ.get("FSDP_VERSION", "1") != "2":
        raise SettingError(f"accelerate: FSDP version {environ.get('FSDP_VERSION', '1')}, 2 expected; {instead}")
    if on("FSDP_OFFLOAD_PARAMS"):
        raise SettingError("accelerate: fsdp_offload_params is not supported; set it to false and use more ranks")
    return True


def split(adapters: Adapters, ranks: Ranks) -> None:
    """Split the layers of a base that lies in the CPU's memory over the ranks; everything else goes whole to this rank's device.

    To be called once all policies have their adapters and before any optimizer is made. Each layer passes through the device by itself, so
    the whole base is never there. Raises `SettingError` where there is nobody to share with, or the model has no list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if ranks.size == 1:
        raise SettingError(
            "shard_base: one process has nobody to share the base with; start several "
            "(accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes N)"
        )
    decoder = adapters.model.get_base_model().get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise SettingError(f"shard_base: {type(decoder).__name__} has no list of layers to split; set shard_base to false")
    _ = adapters.loaded_sha256  # while it is whole, for rank 0 will ask for it alone
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for name, p in adapters.model.named_parameters() if ".lora_" in name or id(p) not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)  # holds nothing itself; lets it fetch the next layer ahead
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    for module in adapters.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(ranks.device))
    adapters.refresh()
    ranks.lockstep = True


def join_probes(run: Run) -> None:
    """Every rank is ready to compute a proof's log-probs when rank 0 asks, see `probed_together`."""

    def compute(base: str, found: list[dict[str, Any]], *how: Any) -> list[float]:
        return trainer_logprobs(run.bases[base].adapters, [from_json(Probe, probe) for probe in found], *how)

    run.ranks.joined[PROBE] = compute


def probed_together(run: Run, base: str) -> Any:
    """`trainer_logprobs` of a base of this run (rank 0 only), with the other ranks taking part."""

    def forward(found: Any, *how: Any) -> list[float]:
        return run.ranks.together(PROBE, base, to_json(list(found)), *how)

    return forward
