"""Memory that a trainer will need of its device, estimated before any weight is loaded.

Parameters are counted, activations are measured: the model's decoder with its adapters runs on
torch's meta device, where tensors have shapes and no data, and what autograd would keep for the
backward pass is added up. Attention there keeps its score matrix, which the kernels used in
training do not, so two lengths are measured and the part that grows with the square is left out.
Prefix trees computed by branches keep the keys and values of a prefix once per branch that sees
them, which is added.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...agents.types import PolicySpec, SettingError
from ...rollouts.engines.factory import choose_engine
from ..config import RunConfig
from .base.lora_targets import linear_names
from .base_models import base_on_meta, dtype_of
from .lm_head import chunk_of

log = logging.getLogger(__name__)

GIB = 2**30
CONTEXT = 1.5 * GIB  # CUDA's own, its libraries' workspaces, and the allocator's gaps
LARGEST_SHARE, SMALLEST_SHARE = 0.9, 0.1
# of a row of trees: how often its keys are kept, where the episodes are not known yet
KEYS_PER_TOKEN = 4.0
CPU_SHARE = 0.5  # of a machine's memory, for the trainers on its CPU


@dataclass(frozen=True)
class Memory:
    """Bytes of one base in the trainer. `parameters`, `adapter_parameters`: counts; `activations`:
    of one batch, kept for backward. `held`: False where nothing on the base is trained, so that
    its `weights` are its engine's alone."""

    parameters: int
    adapter_parameters: int
    weights: float
    adapters: float
    activations: float
    head: float
    held: bool = True

    @property
    def total(self) -> float:
        """What the trainer needs."""
        if not self.held:
            return 0.0
        return self.weights + self.adapters + self.activations + self.head


def is_adapted(spec: PolicySpec, module: str) -> bool:
    """Does the policy's LoRA stand on this linear layer?"""
    if spec.adapter.targets == ("all-linear",):
        return "lm_head" not in module
    return any(module == target or module.endswith(f".{target}") for target in spec.adapter.targets)


def estimate(
    model: str,
    specs: Iterable[PolicySpec],
    config: RunConfig,
    dtype: torch.dtype,
    ranks: int = 1,
    *,
    recompute: bool = False,
    keys_per_token: float | None = None,
    on_cpu: bool = False,
) -> Memory:
    """Memory of one rank's trainer for the base in folder `model` and these policies. Raises
    `SettingError` if it is no causal language model.

    Args:
        ranks: how many share the base's layers (`shard_base`); of these, two are whole at a time:
            the one at work and the next.
        recompute: activations are computed again in the backward pass.
        keys_per_token: keys that attention gathers, by token of a row; None: what `config.layout`
            is likely to need.
        on_cpu: attention over trees takes float32 there, see `tree_attention`, and the head
            fewer terms at a time.
    """
    specs = [spec for spec in specs if spec.has_adapter]
    network = base_on_meta(model, dtype)
    parameters, adapters = _counts(network, specs)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    decoder = network.get_decoder()
    in_layers = sum(p.numel() for p in getattr(decoder, "layers", network).parameters())
    text, rows = network.config.get_text_config(), config.tokens_per_batch
    layers = text.num_hidden_layers
    whole = (
        parameters
        if ranks == 1
        else parameters - in_layers + in_layers / ranks + 2 * in_layers / layers
    )
    trees = config.layout in ("auto", "shared")
    if keys_per_token is None:
        keys_per_token = KEYS_PER_TOKEN if trees else 1.0
    per_token = _activations_or_count(network, specs, dtype, keys_per_token, on_cpu and trees)
    if recompute:  # the inputs of all layers and of the last norm, and all of one layer
        per_token = text.hidden_size * dtype.itemsize * (layers + 1) + per_token / layers
    return Memory(
        parameters,
        adapters,
        weights=dtype.itemsize * whole,
        adapters=adapters * 16,  # float32 weights, gradients and AdamW's two moments
        activations=per_token * rows,
        # logits, log-softmax, probabilities and a gradient, float32
        head=4 * 4 * min(chunk_of(vocabulary, "cpu" if on_cpu else "cuda"), rows) * vocabulary,
    )


def engine_estimate(model: str, specs: Iterable[PolicySpec], dtype: torch.dtype) -> Memory:
    """Memory of a base that is served and not loaded for training, see `Memory.held`."""
    network = base_on_meta(model, dtype)
    parameters, adapters = _counts(network, [spec for spec in specs if spec.has_adapter])
    return Memory(parameters, adapters, dtype.itemsize * float(parameters), 0, 0, 0, held=False)


def _counts(network: Any, specs: Sequence[PolicySpec]) -> tuple[int, int]:
    """Parameters of the base, and of these policies' adapters on it."""
    known = {*linear_names(network), "lm_head"}
    linears = {n: m for n, m in network.named_modules() if n.rsplit(".", 1)[-1] in known}
    adapters = sum(
        spec.adapter.r * (m.in_features + m.out_features)
        for spec in specs
        for name, m in linears.items()
        if is_adapted(spec, name)
    )
    return sum(p.numel() for p in network.parameters()), adapters


def _activations_per_token(
    network: Any,
    specs: Sequence[PolicySpec],
    dtype: torch.dtype,
    keys_per_token: float,
    float32_attention: bool,
) -> float:
    """Bytes kept for the backward pass per token of a row, for the policy with the most LoRA
    parameters; 0 without an adapter."""
    known = {*linear_names(network), "lm_head"}
    names = [name for name, _ in network.named_modules() if name.rsplit(".", 1)[-1] in known]
    largest = max(
        specs,
        key=lambda spec: sum(is_adapted(spec, name) for name in names) * spec.adapter.r,
        default=None,
    )
    if largest is None:
        return 0.0
    adapted = [name for name in names if is_adapted(largest, name)]
    text, width = network.config.get_text_config(), dtype.itemsize
    queries, keys = (
        text.num_hidden_layers * heads * _head_size(text)
        for heads in (text.num_attention_heads, _key_heads(text))
    )
    attended = 4 if float32_attention else width  # bytes of queries, keys, values, outputs
    attention = 2 * keys * (keys_per_token * attended - width) + 2 * queries * (attended - width)
    return _saved_per_token(network, largest, adapted, dtype) + attention


def _activations_or_count(
    network: Any,
    specs: Sequence[PolicySpec],
    dtype: torch.dtype,
    keys_per_token: float,
    float32_attention: bool,
) -> float:
    """`_activations_per_token`, or with a warning a rough count where that cannot be measured."""
    try:
        return _activations_per_token(network, specs, dtype, keys_per_token, float32_attention)
    # models raise kinds of their own on the meta device: kernels without shapes, routing by values
    except Exception as error:
        log.warning(
            "memory: activations of %s cannot be measured before it is loaded (%s: %s), so they are"
            " a rough count; set gradient_checkpointing or lower tokens_per_batch if it runs out",
            type(network).__name__,
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "",
        )
        return _counted_per_token(network, dtype)


def _counted_per_token(network: Any, dtype: torch.dtype) -> float:
    """The same, counted: inputs and outputs of every linear map that a token passes, of its experts
    only."""
    text = network.config.get_text_config()
    routed = getattr(text, "num_experts_per_tok", None) or 1
    numbers = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            numbers += module.in_features + module.out_features
        else:
            numbers += sum(
                routed * (p.shape[1] + p.shape[2])
                for p in module.parameters(recurse=False)
                if p.dim() == 3
            )
    return float(dtype.itemsize * numbers)


def _key_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _saved_per_token(
    model: Any, spec: PolicySpec, modules: Sequence[str], dtype: torch.dtype
) -> float:
    """Bytes that autograd keeps per token of a row when this policy's adapter (float32) is
    trained."""
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    wrapped = get_peft_model(
        model,
        LoraConfig(r=spec.adapter.r, lora_alpha=spec.adapter.alpha, target_modules=list(modules)),
    )
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    decoder = wrapped.train().get_base_model().get_decoder()
    own = {_storage(t) for t in (*wrapped.parameters(), *wrapped.buffers())}

    def saved(length: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if _storage(tensor) not in own:
                # kept alive, so that no other storage takes its number
                storages[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            decoder(
                input_ids=torch.zeros((1, length), dtype=torch.long, device="meta"),
                position_ids=torch.arange(length, device="meta")[None],
                attention_mask=torch.zeros((1, 1, length, length), dtype=dtype, device="meta"),
                use_cache=False,
            )
        return sum(storage.nbytes() for storage in storages.values())

    short, long = 16, 32
    # saved(n) = a n + b n^2, so a = (4 saved(n) - saved(2 n)) / 2 n
    return (4 * saved(short) - saved(long)) / long


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def server_share(needs: Sequence[Memory], device_bytes: float, say: Callable[[str], None]) -> float:
    """Share of one GPU for each of the `len(needs)` servers that stand on it beside their trainers.

    A trainer gets what it is estimated to need and half as much again; the servers divide the rest.
    Raises `SettingError` if less is left than the weights of the largest base and a tenth of the
    GPU.
    """
    trainer = 1.5 * sum(need.total for need in needs) + CONTEXT
    share = min((1 - trainer / device_bytes) / len(needs), LARGEST_SHARE)
    least = max(need.weights for need in needs) / device_bytes + SMALLEST_SHARE
    split = (
        f"trainer about {trainer / GIB:.1f} GiB of the GPU's {device_bytes / GIB:.0f} (its"
        " estimate, half as much again, CUDA's own)"
    )
    if share < least:
        raise SettingError(
            f"server_memory: {split}; a server needs at least {least:.0%} and gets"
            f" {max(share, 0):.0%}; give it a GPU of its own (server_devices), set server_memory,"
            " or lower tokens_per_batch or set gradient_checkpointing"
        )
    say(f"memory: {split}; vLLM takes {share:.0%}")
    return share


@dataclass(frozen=True)
class TrainerPlacement:
    """The bases of a team and where their trainer computes.

    bases: the policies of every base, by the base's folder. ranks: how many share the layers of a
    base, see `estimate`. served_only: folders of those that the trainer does not load, because
    nothing on them is trained.
    """

    config: RunConfig
    bases: Mapping[str, Sequence[PolicySpec]]
    device: torch.device
    ranks: int = 1
    served_only: frozenset[str] = frozenset()

    @property
    def trains(self) -> bool:
        """Does the trainer load any base?"""
        return not self.served_only.issuperset(self.bases)

    def memory(self, recompute: bool = False) -> dict[str, Memory]:
        """`estimate` of every base on one rank, by the base's folder."""
        return {
            path: engine_estimate(path, specs, dtype_of(path, self.config.dtype, self.device))
            if path in self.served_only
            else estimate(
                path,
                specs,
                self.config,
                dtype_of(path, self.config.dtype, self.device),
                self.ranks,
                recompute=recompute,
                on_cpu=self.device.type == "cpu",
            )
            for path, specs in self.bases.items()
        }


def needs_checkpointing(placement: TrainerPlacement, say: Callable[[str], None]) -> bool:
    """Are activations computed again in the backward pass? `gradient_checkpointing: auto` does so
    only where memory would not do without.

    The answer depends on settings, models and the machine's size, so it is equal on every rank.
    `say` prints why.
    """
    config = placement.config
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing == "true"
    if not placement.trains:
        return False
    needs = list(placement.memory().values())
    room = trainer_room(config, needs, placement.device)
    need = sum(n.total for n in needs)
    if need <= room:
        return False
    say(
        f"memory: the trainer would need about {need / GIB:.1f} GiB and has {room / GIB:.1f}:"
        " gradient checkpointing is on"
    )
    return True


def trainer_room(config: RunConfig, needs: Sequence[Memory], device: torch.device) -> float:
    """Bytes that the trainers of these bases may plan with: on a GPU what servers of ours on it do
    not take, less CUDA's own and an error of the estimate; on a CPU half of the machine's memory,
    divided by the processes on it."""
    if device.type != "cuda":
        return CPU_SHARE * machine_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = torch.cuda.get_device_properties(device).total_memory
    served = config.server_memory * len(needs)
    if _shares_gpu(config) and not config.server_memory:  # the least that `server_share` grants
        served = len(needs) * (max(need.weights for need in needs) / total + SMALLEST_SHARE)
    elif not _shares_gpu(config):
        served = 0.0
    return (total * (1 - served) - CONTEXT) / 1.5


def machine_bytes() -> float:
    """Memory of this machine, or of the container we are in."""
    installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return installed
    return min(installed, float(limit)) if limit.isdigit() else installed


def _shares_gpu(config: RunConfig) -> bool:
    return choose_engine(config)[0] == "vllm" and not (
        config.server_urls or config.endpoints or config.server_devices
    )


def with_server_memory(placement: TrainerPlacement, say: Callable[[str], None]) -> RunConfig:
    """The settings with `server_memory` set where servers of ours share the trainer's GPU and the
    user has not set it. `say` prints how the GPU is split."""
    config = placement.config
    if placement.device.type != "cuda" or config.server_memory or not _shares_gpu(config):
        return config
    if not placement.trains and len(placement.bases) < 2:  # nobody to share the GPU with
        return config
    needs = placement.memory(recompute=needs_checkpointing(placement, say))
    total = torch.cuda.get_device_properties(placement.device).total_memory
    return replace(config, server_memory=server_share(list(needs.values()), total, say))
