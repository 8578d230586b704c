"""A controller: a small network that scores the operators of a supernet for a query, learnt by
policy gradient with an Adam of its own.

The team sees its weights as one value and scores with them in plain Python
(`agents/programs/chooser.py`); this is the same network in torch, where gradients are taken.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...agents.programs.chooser import ControllerShape, packed, unpacked
from ...agents.types import SettingError
from ..checkpoint import CheckpointError, write_tensors
from .parts import checked_name

FILE = "controller.safetensors"
TOLERANCE = 1e-6  # nats between a recorded log-prob and the one that the weights give


@dataclass(frozen=True)
class Draw:
    """One choice of an operator.

    Args:
        where: names it in errors.
        layer: 1, 2, ... of the supernet.
        inputs: features of the query and of each earlier layer, as the chooser was given them.
        options: numbers of the operators that it chose among. choice: the one it took.
        logprob: as recorded when it was drawn.
    """

    where: str
    layer: int
    inputs: Sequence[float]
    options: Sequence[int]
    choice: int
    logprob: float


class Controller:
    """The network of a supernet's controller, a part of the run.

    Args:
        name: of the part and of the value.
        shape: the sizes.
        learning_rate: of Adam; 0 moves nothing.
        seed: of the initial weights. The last layers begin at 0, so all operators are equally
            likely at first.

    Weights are float32 and computed with in float64, as the chooser does.
    """

    def __init__(self, name: str, shape: ControllerShape, learning_rate: float, seed: int) -> None:
        if not math.isfinite(learning_rate) or learning_rate < 0:
            raise SettingError(f"{name}: expected a learning rate from 0, got {learning_rate!r}")
        self.name, self.shape, self.learning_rate = checked_name(name), shape, learning_rate
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            tensor: nn.Parameter(_initial(tensor, sizes, generator))
            for tensor, sizes in shape.tensors.items()
        }
        self._adam = torch.optim.Adam(self.weights.values(), lr=learning_rate)

    def set_weights(self, weights: Mapping[str, str]) -> None:
        """Take weights such as a team's value has them. Raises `SettingError` if they do not
        fit."""
        if fault := self.shape.fault(weights):
            raise SettingError(f"{self.name}: {fault}")
        for name, parameter in self.weights.items():
            parameter.data = torch.tensor(unpacked(weights[name])).reshape(parameter.shape)

    def values(self) -> Mapping[str, Any]:
        packs = {
            name: packed(weight.detach().flatten().tolist())
            for name, weight in self.weights.items()
        }
        return {self.name: packs}

    def scores(self, layer: int, inputs: torch.Tensor) -> torch.Tensor:
        """Scores [N, operators] of a layer for inputs [N, features x layer], float64."""
        hidden = torch.tanh(self._linear(f"{layer}.hidden", inputs))
        return self._linear(f"{layer}.score", hidden)

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return nn.functional.linear(inputs, weight.double(), bias.double())

    def log_softmax(self, draws: Sequence[Draw]) -> torch.Tensor:
        """Log-probs [N, operators] of what each draw could choose, in nats; -inf for the rest."""
        rows: list[torch.Tensor] = [torch.empty(0)] * len(draws)
        for layer in sorted({draw.layer for draw in draws}):
            own = [n for n, draw in enumerate(draws) if draw.layer == layer]
            inputs = torch.tensor([draws[n].inputs for n in own], dtype=torch.float64)
            scores = self.scores(layer, inputs)
            closed = torch.ones_like(scores, dtype=torch.bool)
            for row, n in enumerate(own):
                closed[row, list(draws[n].options)] = False
            found = scores.masked_fill(closed, -math.inf).log_softmax(-1)
            for row, n in enumerate(own):
                rows[n] = found[row]
        return torch.stack(rows)

    def update(
        self, draws: Sequence[Draw], weights: Sequence[float], num_episodes: int
    ) -> dict[str, float]:
        """One step of Adam down the loss -(1/N) sum of A log p(choice) (REINFORCE).

        Args:
            draws: of a step's episodes. weights: A of each [len(draws)].
            num_episodes: N.

        Without a weight but 0 there is no step. Returns the loss before the step, the gradient's
        norm, and the mean entropy of the draws (nats). Raises `ValueError` for a weight that is not
        finite, and for a draw whose recorded log-prob is another than these weights give: then it
        was drawn by another controller.
        """
        if not draws:
            return {"loss": 0.0, "grad_norm": 0.0, "entropy": 0.0}
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"{self.name}: a weight is not finite: {weights}")
        logprobs = self.log_softmax(draws)
        chosen = logprobs[range(len(draws)), [draw.choice for draw in draws]]
        self._check_recorded(draws, chosen.tolist())
        factors = torch.tensor(weights, dtype=torch.float64)
        loss = -(factors * chosen).sum() / max(num_episodes, 1)
        self._adam.zero_grad()
        loss.backward()
        norms = [w.grad.double().norm() for w in self.weights.values() if w.grad is not None]
        metrics = {
            "loss": loss.item(),
            "grad_norm": torch.stack(norms).norm().item(),
            "entropy": _entropy(logprobs.detach()),
        }
        if any(weights):
            self._adam.param_groups[0]["lr"] = self.learning_rate
            self._adam.step()
        return metrics

    def _check_recorded(self, draws: Sequence[Draw], logprobs: Sequence[float]) -> None:
        for draw, logprob in zip(draws, logprobs, strict=True):
            if abs(logprob - draw.logprob) > TOLERANCE:
                raise ValueError(
                    f"{draw.where}: its log-prob is {draw.logprob:.6f}, and these weights give"
                    f" {logprob:.6f}; it was drawn by another controller"
                )

    # a part of the run

    def sha256(self) -> str:
        found = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            found.update(name.encode("ascii") + weight.detach().numpy().astype("<f4").tobytes())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        tensors = {name: weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in self._adam.state.get(weight, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        write_tensors(folder / FILE, tensors)

    def load(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        for name, weight in self.weights.items():
            if name not in tensors or tensors[name].shape != weight.shape:
                found = list(tensors[name].shape) if name in tensors else "none"
                raise SettingError(
                    f"{self.name}: tensor {name} of this run has the shape {list(weight.shape)},"
                    f" the checkpoint's {found}; resume with the same system"
                )
            weight.data = tensors[name]
        state = self._adam.state_dict()
        state["state"] = {
            number: {key: tensors[f"adam.{key}.{name}"] for key in ADAM}
            for number, name in enumerate(self.weights)
            if f"adam.step.{name}" in tensors
        }
        self._adam.load_state_dict(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """A copy with an optimizer of its own."""
        twin = Controller(self.name, self.shape, self.learning_rate, 0)
        for name, weight in self.weights.items():
            twin.weights[name].data = weight.detach().clone()
        twin._adam.load_state_dict(copy.deepcopy(self._adam.state_dict(), memo))
        return twin


ADAM = ("step", "exp_avg", "exp_avg_sq")  # what torch's Adam remembers of a tensor


def _initial(name: str, sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("hidden.weight"):
        return torch.randn(*sizes, generator=generator)
    return torch.zeros(*sizes)


def _entropy(logprobs: torch.Tensor) -> float:
    """Mean over the draws of -sum p log p, in nats."""
    terms = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)
    return -terms.sum(-1).mean().item()
