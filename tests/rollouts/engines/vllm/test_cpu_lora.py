"""LoRA by groups of rows, against one row at a time."""

from __future__ import annotations

import subprocess
import sys

import torch

from marlora.rollouts.engines.vllm.cpu_lora import add_lora, groups_of

SLOTS, R, IN, SIZES = 3, 2, 4, (5, 3)


def stacked() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(SLOTS, 1, R, IN, generator=generator) for _ in SIZES]
    b = [torch.randn(SLOTS, 1, size, R, generator=generator) for size in SIZES]
    return a, b


def test_groups():
    assert groups_of(torch.tensor([-1, -1])) == []
    assert groups_of(torch.tensor([2, 2])) == [(2, None)]
    groups = groups_of(torch.tensor([1, -1, 0, 1]))
    assert [(slot, rows.tolist()) for slot, rows in groups] == [(0, [2]), (1, [0, 3])]


def check(indices: list[int]) -> None:
    a, b = stacked()
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(len(indices), IN, generator=generator),
        torch.randn(len(indices), sum(SIZES), generator=generator),
    )
    expected = y.clone()
    for row, slot in enumerate(indices):
        if slot >= 0:
            expected[row] += torch.cat(
                [b[s][slot, 0] @ (a[s][slot, 0] @ x[row]) * 0.5 for s in range(2)]
            )
    before = y.clone()
    add_lora(y, x, a, b, 0.5, SIZES, groups_of(torch.tensor(indices)))
    torch.testing.assert_close(y, expected)
    for row, slot in enumerate(indices):
        if slot < 0:
            assert torch.equal(
                y[row], before[row]
            )  # the base to the last bit, though slot -1, the last, holds an adapter


def test_rows_of_the_base_are_left_alone_beside_adapters():
    check([0, -1, 2, 2, -1, 1])


def test_one_adapter_and_no_adapter():
    check([1, 1, 1])
    check([-1, -1])


def test_narrow_weights_are_multiplied_in_float32():
    a, b = ([weights.bfloat16() for weights in stack] for stack in stacked())
    x, y = torch.ones(2, IN, dtype=torch.bfloat16), torch.zeros(2, sum(SIZES), dtype=torch.bfloat16)
    add_lora(y, x, a, b, 1.0, SIZES, groups_of(torch.tensor([2, -1])))
    exact = torch.cat([b[s][2, 0].float() @ (a[s][2, 0].float() @ x[0].float()) for s in range(2)])
    assert torch.equal(y[0], exact.bfloat16())  # rounded once
    assert not y[1].any()


def test_importing_it_outside_a_worker_does_nothing():
    script = (
        "import sys, marlora.rollouts.engines.vllm.cpu_lora; assert not {'torch', 'vllm'} &"
        " set(sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == ""
    )
