"""The optimizer step of a team: who owns which tensors, and what the gradient must not depend
on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from marlora.agents.types import AdapterSpec, PolicySpec
from marlora.trainers.batching.batches import pack, split_over_ranks
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.testbeds.tiny import tiny_network
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import policy_loss
from marlora.trainers.update.optimizer_step import Optimizers, update

pytestmark = pytest.mark.usefixtures("one_thread")


def make(hidden_size: int = 32, **settings: Any) -> Optimizers:
    policies = [
        PolicySpec(name, adapter=AdapterSpec(4, 8.0, ("q_proj", "v_proj"))) for name in ("a", "b")
    ]
    adapters = Adapters(tiny_network(hidden_size=hidden_size, layers=2), policies, seed=0)
    for name in ("a", "b"):  # away from B = 0, where A has no gradient
        generator = torch.Generator().manual_seed(7)
        for parameter in adapters.parameters(name).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Optimizers(adapters, GRPOConfig(max_grad_norm=1e9, learning_rate=1e-3, **settings))


def sample(policy: str, number: int, length: int = 6) -> TrainingSequence:
    """A prompt of five tokens and a reply; lengths, tokens and advantages follow from the
    number."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 260, (5 + length + number % 3,), generator=generator).tolist()
    new = len(ids) - 5
    columns = [
        [0] * 5 + [1] * new,
        [0.0] * 5 + [-5.5] * new,
        [0.0] * 5 + [(-1.0) ** number * (1 + number)] * new,
    ]
    return TrainingSequence(
        policy,
        f"{policy}{number}",
        tuple(ids),
        *map(tuple, columns),
        (1.0,) * len(ids),
        (-1,) * 5 + (0,) * new,
    )


def step(optimizers: Optimizers, samples: list[TrainingSequence]) -> dict[str, torch.Tensor]:
    """One update; the summed gradient of each policy, from its optimizer's first moment (0.1 of it
    after one step)."""

    def loss(inputs: LossInputs) -> Any:
        return policy_loss(inputs, optimizers.config)

    done = update(optimizers, samples, loss, 1, Ranks())
    assert all(result.applied for result in done.values())
    found = {}
    for name in done:
        moments = optimizers.state(name)
        found[name] = (
            torch.cat(
                [t.flatten() for key, t in sorted(moments.items()) if key.endswith(".exp_avg")]
            ).double()
            * 10
        )
        assert found[name].norm().item() == pytest.approx(done[name].grad_norm, rel=1e-5)
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


SAMPLES = [sample("a", k) for k in range(7)]


@pytest.mark.parametrize("tokens", [12, 30, 64])
def test_accumulation_does_not_change_the_gradient(tokens: int) -> None:
    whole = step(make(), SAMPLES)["a"]
    assert relative(step(make(tokens_per_batch=tokens), SAMPLES)["a"], whole) < 1e-6


@pytest.mark.parametrize("tokens", [12, 30, 8192])
def test_division_by_calls_does_not_depend_on_packing_or_ranks(tokens: int) -> None:
    """It is the gradient of advantages divided by hand, however samples are packed; and what two
    ranks have of the terms is all of them, each with the calls of its episode."""
    called = [dataclasses.replace(s, calls=1 + k % 3) for k, s in enumerate(SAMPLES)]
    divided = [
        dataclasses.replace(s, advantages=tuple(a / (1 + k % 3) for a in s.advantages))
        for k, s in enumerate(SAMPLES)
    ]
    whole = step(make(), divided)["a"]
    found = step(make(tokens_per_batch=tokens, normalize_by_calls=True), called)["a"]
    assert relative(found, whole) < 1e-6
    assert relative(step(make(), called)["a"], whole) > 0.1
    ranks = split_over_ranks(pack(called, max_tokens=tokens, parts=2), 2)
    of = {s.episode: s.calls for s in called}
    terms = [
        (float(b.calls[n]), of[b.turns[int(b.sequence[n])][0]])
        for share in ranks
        for b in share
        for n in range(b.num_terms)
    ]
    assert all(share for share in ranks) and len(terms) == sum(s.num_trained for s in called)
    assert all(got == expected for got, expected in terms)


def test_other_agents_do_not_change_the_gradient() -> None:
    alone = step(make(), SAMPLES)["a"]
    together = step(make(), [*SAMPLES, *(sample("b", k, length=20) for k in range(9))])
    assert torch.equal(together["a"], alone)


def test_the_number_of_threads_changes_rounding_only() -> None:
    """A model wide enough for torch to share its products among threads."""
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        optimizers = make(hidden_size=256)
        gradient = step(optimizers, [sample("a", k, length=40) for k in range(12)])["a"]
        weights = torch.cat(
            [p.detach().flatten() for p in optimizers.adapters.parameters("a").values()]
        ).double()
        found[threads] = (gradient, weights)
    assert relative(found[2][0], found[1][0]) < 1e-6
    assert relative(found[2][1], found[1][1]) < 1e-6


def test_the_same_step_twice_is_the_same_to_the_last_bit() -> None:
    one, two = make(tokens_per_batch=30), make(tokens_per_batch=30)
    step(one, SAMPLES)
    step(two, SAMPLES[::-1])  # nor does the order of samples matter
    assert one.adapters.sha256("a") == two.adapters.sha256("a") != make().adapters.sha256("a")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_tensor_of_the_policy_has_a_finite_gradient(checkpointing: bool) -> None:
    optimizers = make()
    if checkpointing:
        optimizers.adapters.checkpoint_activations()
        optimizers.adapters.model.train()
    step(optimizers, SAMPLES)
    moments = {key: t for key, t in optimizers.state("a").items() if key.endswith(".exp_avg")}
    assert len(moments) == len(optimizers.adapters.parameters("a")) == 2 * 2 * 2
    assert all(torch.isfinite(t).all() and t.abs().sum() > 0 for t in moments.values())
    assert optimizers.state("b") == {}


def test_an_optimizer_with_a_foreign_tensor_is_found_before_the_step() -> None:
    optimizers = make()
    before = optimizers.adapters.sha256("a")
    optimizers.of["a"].param_groups[0]["params"].append(
        next(iter(optimizers.adapters.parameters("b").values()))
    )
    with pytest.raises(RuntimeError, match="optimizer of policy 'a' does not hold exactly"):
        step(optimizers, SAMPLES)
    assert optimizers.adapters.sha256("a") == before


def test_a_gradient_switched_on_elsewhere_is_found_before_the_step() -> None:
    optimizers = make()
    weight = next(p for n, p in optimizers.adapters.model.named_parameters() if "lora_" not in n)
    weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad"):
        step(optimizers, SAMPLES)
