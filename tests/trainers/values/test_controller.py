"""The controller: the same scores as the chooser's, gradients by hand, and a part of the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.programs.chooser import Chooser, ControllerShape, packed
from marlora.agents.types import SettingError
from marlora.trainers.checkpoint import CheckpointError
from marlora.trainers.values.controller import FILE, Controller, Draw
from marlora.trainers.values.parts import load_parts, save_parts
from marlora.trainers.values.text_encoder import mean_pooled

SHAPE = ControllerShape(layers=2, operators=5, features=3, hidden=4)
INPUTS = ([0.2, -0.4, 0.9], [0.2, -0.4, 0.9, 1.0, 0.0, -1.0])


def controller(learning_rate: float = 0.1, seed: int = 0, moved: bool = False) -> Controller:
    """`moved`: its last layers are no longer 0."""
    made = Controller("supernet", SHAPE, learning_rate, seed)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for weight in made.weights.values():
            weight.data += torch.randn(weight.shape, generator=generator)
    return made


def with_scores(scores: Sequence[float]) -> Controller:
    """One whose scores in the first layer are these, whatever the inputs."""
    made = controller()
    made.weights["1.score.bias"].data = torch.tensor(scores)
    return made


def draw(options: Sequence[int], choice: int, logprob: float, layer: int = 1) -> Draw:
    return Draw("episode e, decision 0", layer, INPUTS[layer - 1], options, choice, logprob)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_chooser_gives_the_same_scores(layer: int) -> None:
    made = controller(moved=True)
    own = made.scores(layer, torch.tensor([INPUTS[layer - 1]], dtype=torch.float64))
    theirs = Chooser(made.values()["supernet"], SHAPE).scores(layer, INPUTS[layer - 1])
    assert own[0].tolist() == pytest.approx(theirs, abs=1e-12) and len(set(theirs)) == 5


def test_at_first_all_operators_are_equally_likely() -> None:
    logprobs = controller().log_softmax([draw([0, 2, 4], 2, 0.0)])[0].exp().tolist()
    assert logprobs == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert controller(seed=1).sha256() != controller(seed=0).sha256() == controller().sha256()


def test_the_loss_of_the_authors_code() -> None:
    """Fact 2 of the sheet: log p = (-1.5, -2, -.7, -2.5), utilities (.97, -.06, .985, -.09)."""
    logprobs, utilities = (-1.5, -2.0, -0.7, -2.5), (0.97, -0.06, 0.985, -0.09)
    made = with_scores([lp - math.log1p(-math.exp(lp)) for lp in logprobs] + [0.0])
    draws = [draw([k, 4], k, lp) for k, lp in enumerate(logprobs)]
    metrics = made.update(draws, utilities, 4)
    assert metrics["loss"] == pytest.approx(0.449875, abs=1e-6)
    # dL/dlog p = -u / 4, and dlog p / dscore = 1 - p of two options
    by_logprob = (-0.242500, 0.015000, -0.246250, 0.022500)
    expected = [g * (1 - math.exp(lp)) for g, lp in zip(by_logprob, logprobs, strict=True)]
    found = made.weights["1.score.bias"].grad
    assert found is not None
    assert found.tolist() == pytest.approx([*expected, -sum(expected)], abs=1e-6)


def test_adam_makes_what_was_good_likelier() -> None:
    made = controller(0.01)
    before = made.log_softmax([draw([0, 1], 0, 0.0)])[0, 0].item()
    metrics = made.update([draw([0, 1], 0, math.log(0.5))], [1.0], 1)
    assert made.log_softmax([draw([0, 1], 0, 0.0)])[0, 0].item() > before
    assert metrics["entropy"] == pytest.approx(math.log(2))
    assert metrics["loss"] == pytest.approx(math.log(2)) and metrics["grad_norm"] > 0
    assert made.weights["1.score.bias"].tolist() == pytest.approx([0.01, -0.01, 0, 0, 0], abs=1e-6)
    untouched = [n for n, w in controller().weights.items() if torch.equal(w, made.weights[n])]
    assert {n for n in untouched if n.startswith("2.")} == {n for n in SHAPE.tensors if n[0] == "2"}


@pytest.mark.parametrize(("learning_rate", "weight"), [(0.0, 1.0), (0.1, 0.0)])
def test_nothing_moves_without_a_rate_or_a_weight(learning_rate: float, weight: float) -> None:
    made, other = controller(learning_rate), controller(0.1)
    made.update([draw([0, 1], 0, math.log(0.5))], [weight], 1)
    assert made.sha256() == controller().sha256()
    other.update([draw([0, 1], 0, math.log(0.5))], [1.0], 1)
    assert other.sha256() != controller().sha256()
    assert made.update([], [], 0)["loss"] == 0.0


def test_draws_of_another_controller_are_refused() -> None:
    with pytest.raises(ValueError, match=r"episode e, decision 0: its log-prob is -0.10.*another"):
        controller().update([draw([0, 1], 0, -0.1)], [1.0], 1)
    with pytest.raises(ValueError, match="a weight is not finite"):
        controller().update([draw([0, 1], 0, math.log(0.5))], [math.nan], 1)


# a part


def trained(steps: int = 3) -> Controller:
    made = controller()
    for _ in range(steps):
        again(made)
    return made


def again(made: Controller) -> None:
    logprob = made.log_softmax([draw([0, 1, 3], 3, 0.0, 2)])[0, 3].item()
    made.update([draw([0, 1, 3], 3, logprob, 2)], [0.5], 1)


def test_what_is_saved_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    made, restored = trained(), controller(seed=7)
    hashes = save_parts([made], tmp_path)
    load_parts([restored], tmp_path, hashes)
    assert restored.values() == made.values()
    for each in (made, restored):
        again(each)
    assert restored.sha256() == made.sha256() == trained(4).sha256()
    assert [file.name for file in (tmp_path / "supernet").iterdir()] == [FILE]


def test_a_copy_is_independent() -> None:
    """A step that was cut off is undone with a copy, moments of Adam included."""
    made = trained()
    twin = copy.deepcopy(made)
    again(made)
    assert twin.sha256() == trained().sha256() != made.sha256()
    made.__dict__.clear()
    made.__dict__.update(twin.__dict__)
    again(made)
    assert made.sha256() == trained(4).sha256()


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    trained().save(tmp_path)
    wider = Controller("supernet", ControllerShape(2, 5, 3, 8), 0.1, 0)
    with pytest.raises(SettingError, match=r"tensor 1.hidden.weight .* \[8, 3\].* \[4, 3\]"):
        wider.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"controller\.safetensors: cannot be read"):
        trained().load(tmp_path)


def test_values_as_the_team_has_them() -> None:
    made, other = trained(), controller(seed=5)
    other.set_weights(made.values()["supernet"])
    assert other.sha256() == made.sha256()
    values: dict[str, Any] = {**made.values()["supernet"], "1.score.bias": packed([0.0])}
    with pytest.raises(SettingError, match=r"supernet: 1.score.bias: expected \(5,\) numbers"):
        other.set_weights(values)
    with pytest.raises(SettingError, match="expected a learning rate from 0"):
        controller(-1.0)


# an encoder of a model's own


def test_a_models_mean_hidden_state(model: Path) -> None:
    encode = mean_pooled(str(model))
    found = encode("What is 2 + 2?")
    assert math.fsum(x * x for x in found) == pytest.approx(1.0) and list(found) == list(
        mean_pooled(str(model))("What is 2 + 2?")
    )
    assert encode("") != found and len(encode("")) == len(found)
    with pytest.raises(SettingError, match=r"mean_pooled\(/nowhere\): cannot be loaded"):
        mean_pooled("/nowhere")("text")
