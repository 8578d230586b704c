"""A chooser scores the operators of a supernet for a query: a small network whose weights are a
value of the team, so a state's key covers it and a checkpoint evaluates without its trainer.

The scores of layer l are FFN_l(v(q) || v(V_1) || ... || v(V_(l-1))): the query's features and, per
earlier layer, the sum of its active operators' (MaAS, arXiv:2502.04180, section 3). The networks
have one hidden layer with tanh. Plain Python in double precision; the trainer's torch module
(`trainers/values/controller.py`) has the same weights and gives the same scores.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

Weights = Mapping[str, str]  # name of a tensor -> its float32 numbers, row by row, in base64


@dataclass(frozen=True)
class ControllerShape:
    """The sizes of a controller: `layers` of the supernet, `operators` that are scored in each,
    `features` of a query or operator, and `hidden` units."""

    layers: int
    operators: int
    features: int
    hidden: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(1, self.layers + 1):
            found |= {
                f"{layer}.hidden.weight": (self.hidden, self.features * layer),
                f"{layer}.hidden.bias": (self.hidden,),
                f"{layer}.score.weight": (self.operators, self.hidden),
                f"{layer}.score.bias": (self.operators,),
            }
        return found

    def fault(self, weights: Any) -> str | None:
        """Why these are no weights of a controller of this shape; None if they are."""
        if not isinstance(weights, Mapping):
            return f"expected weights by name of a tensor, got {weights!r:.60}"
        shapes = self.tensors
        for name in [*shapes, *weights]:
            if name not in shapes or name not in weights:
                where = "is missing" if name in shapes else "is no tensor of this controller"
                return f"{name!r:.60} {where}; it belongs to another supernet"
            try:
                numbers = unpacked(weights[name])
            except (ValueError, TypeError) as error:
                return f"{name}: expected float32 numbers in base64 ({error})"
            if len(numbers) != math.prod(shapes[name]):
                return f"{name}: expected {shapes[name]} numbers, got {len(numbers)}"
            if not all(map(math.isfinite, numbers)):
                return f"{name}: a number is not finite"
        return None


def packed(numbers: Sequence[float]) -> str:
    """Numbers as little-endian float32 in base64."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii")


def unpacked(text: str) -> tuple[float, ...]:
    """What `packed` packed. Raises `ValueError` for another text."""
    try:
        data = base64.b64decode(text, validate=True)
        return struct.unpack(f"<{len(data) // 4}f", data)
    except (binascii.Error, struct.error) as error:
        raise ValueError(str(error)) from error


class Chooser:
    """Scores of the operators, layer by layer.

    Args:
        weights: by name of a tensor; None or nothing scores every operator 0: all are equally
            likely.
        shape: the sizes; the weights have to fit (`ControllerShape.fault`).
    """

    def __init__(self, weights: Weights | None, shape: ControllerShape) -> None:
        self.shape = shape
        self._rows: dict[str, list[tuple[float, ...]]] = {}
        for name, sizes in shape.tensors.items() if weights else ():
            numbers, width = unpacked(weights[name]), sizes[-1]  # type: ignore[index]
            self._rows[name] = [numbers[i : i + width] for i in range(0, len(numbers), width)]

    def scores(self, layer: int, inputs: Sequence[float]) -> list[float]:
        """A score per operator, in nats up to a constant. `inputs`: `features` numbers of the query
        and of each of the `layer` - 1 earlier layers."""
        expected = self.shape.features * layer
        if len(inputs) != expected:
            raise ValueError(f"layer {layer}: expected {expected} inputs, got {len(inputs)}")
        if not self._rows:
            return [0.0] * self.shape.operators
        hidden = [math.tanh(x) for x in self._linear(f"{layer}.hidden", inputs)]
        return self._linear(f"{layer}.score", hidden)

    def _linear(self, name: str, inputs: Sequence[float]) -> list[float]:
        (bias,) = self._rows[f"{name}.bias"]
        rows = self._rows[f"{name}.weight"]
        return [sum(map(mul, row, inputs), b) for row, b in zip(rows, bias, strict=True)]
